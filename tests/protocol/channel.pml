/* put and get of put_get.cu with the counts of the signal pad, MESSAGES of them over 1 or 2 slots. Two ranks: rank 0
 * puts and rank 1 gets. More: each rank puts to the next and gets from the one before, in turn. One block a rank, since
 * every block has counts and bytes of its own; its first thread signals and waits.
 *
 * Proved: no data race, every message is read as it was sent and in order, and every kernel ends. */
#define FLAGS (2 * RANKS)
#define CELLS (2 * RANKS * THREADS)
#define KEPT 6
#include "views.pml"

#define START 5 /* of counts, so that they wrap around after three messages */

/* What may be broken; the first four are orderings of signal.cuh. */
#define SIGNAL 1
#define WAIT 2
#define ENTER 3
#define LEAVE 4
#define NO_FREE_SLOT 5 /* put does not wait until its slot is free */
#define ONE_SLOT 6     /* every message uses the same slot, as if there were more */

#define LEFT_OF(r) (((r) + RANKS - 1) % RANKS)
#define RIGHT_OF(r) (((r) + 1) % RANKS)
#define POSTED(receiver) (receiver)
#define TAKEN(sender) (RANKS + (sender))
#define SLOT(receiver, m, i) (((receiver) * 2 + (broken == ONE_SLOT -> 0 : (m) % slots)) * THREADS + (i))

byte slots;

inline wait_in_block(f, expected) {
  !waits[self] && (i != 0 || ARRIVED(f, expected));
  if
  :: i == 0 -> load(self, f, expected, broken != WAIT)
  :: else
  fi;
  if
  :: broken != LEAVE -> arrive(self, rank)
  :: else
  fi
}
inline enter_signal() {
  if
  :: broken != ENTER -> arrive(self, rank)
  :: else
  fi
}
inline signal_from_block(f, count) {
  !waits[self];
  if
  :: i == 0 -> store(self, f, count, broken != SIGNAL)
  :: else
  fi;
  arrive(self, rank) /* the kernel ends */
}

inline put() {
  if
  :: broken != NO_FREE_SLOT -> atomic { wait_in_block(TAKEN(rank), START + m + 1 - slots) }
  :: else
  fi;
  atomic { !waits[self]; write_cell(self, SLOT(RIGHT_OF(rank), m, i), m + 1); enter_signal() };
  atomic { signal_from_block(POSTED(RIGHT_OF(rank)), START + m + 1) }
}
/* Its threads have other bytes than those of put. */
inline get() {
  atomic { wait_in_block(POSTED(rank), START + m + 1) };
  atomic { !waits[self]; read_cell(self, SLOT(rank, m, (i + 1) % THREADS), m + 1); enter_signal() };
  atomic { signal_from_block(TAKEN(LEFT_OF(rank)), START + m + 1) }
}

proctype thread(byte self) {
  byte rank = self / THREADS;
  byte i = self % THREADS;
  byte m;
  do
  :: m < MESSAGES ->
     if
     :: RANKS > 2 || rank == 0 -> put()
     :: else
     fi;
     if
     :: RANKS > 2 || rank == 1 -> get()
     :: else
     fi;
     m++
  :: m == MESSAGES -> break
  od
}

init {
  byte t;
  atomic {
    choose_broken();
    start_views(START);
    if
    :: slots = 1
    :: slots = 2
    fi;
    for (t : 0 .. ALL - 1) { run thread(t) }
  }
}
