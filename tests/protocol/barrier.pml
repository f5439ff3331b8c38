/* RankBarrier of signal.cuh, under every sequence of KERNELS one-shot and two-shot kernels (all_reduce.cu;
 * reduce_scatter, all_gather and sharded_adamw have the two barriers of two-shot). RANKS ranks with one block each,
 * since blocks of other numbers share no flag with it. Thread p signals to rank p and waits for it; with THREADS = 1
 * the block is one thread that does so for all.
 *
 * Proved: no data race, every value read is the one of its kernel, and every kernel ends. */
#define FLAGS (RANKS * RANKS)
#define CELLS ((RANKS * RANKS + 2 * RANKS) * THREADS)
#define KEPT 4
#include "views.pml"

#define START 5 /* of epochs, so that they wrap around in the third barrier */

/* What may be broken; the first four are orderings of signal.cuh. */
#define SIGNAL 1
#define WAIT 2
#define ENTER 3
#define LEAVE 4
#define REUSED_EPOCH 5    /* both barriers of a kernel have one epoch */
#define RESET_FLAG 6      /* a flag is 0 or 1, and who has waited resets it */
#define SHARED_FLAG 7     /* one flag a pad, for all ranks */
#define ONE_STAGING 8     /* one set instead of two */
#define NO_LAST_BARRIER 9

mtype = { one_shot, two_shot };
mtype kernel[KERNELS];
hidden byte p, q;

/* The flag that `by` sets in the pad of `owner`; element `i` of a part of a tensor, of a set of staging. */
#define FLAG(owner, by) ((owner) * RANKS + (broken == SHARED_FLAG -> 0 : (by)))
#define TENSOR(owner, part, i) (((owner) * RANKS + (part)) * THREADS + (i))
#define STAGING(owner, set, i) ((RANKS * RANKS + (owner) * 2 + (set)) * THREADS + (i))
/* The set of a one-shot kernel that finds this epoch. */
#define SET(epoch) (broken == ONE_STAGING -> 0 : (epoch) % 2)
/* Versions: what the owner, and what kernel k, writes. */
#define INPUT(k) (2 * (k) + 2)
#define RESULT(k) (2 * (k) + 3)

#define IS_MINE(p) ((p) != rank && (THREADS == 1 || (p) == i))
#define EXPECTED (broken == RESET_FLAG -> START + 1 : epoch)
#define IS_HERE(p) (!IS_MINE(p) || ARRIVED(FLAG(rank, p), EXPECTED))
#if RANKS == 2
#define ALL_ARE_HERE (IS_HERE(0) && IS_HERE(1))
#else
#define ALL_ARE_HERE (IS_HERE(0) && IS_HERE(1) && IS_HERE(2))
#endif

/* A barrier is enter, signal, await; what comes next begins with !waits[self]. */
inline enter() {
  if
  :: broken != ENTER -> arrive(self, rank)
  :: else
  fi
}
inline signal() {
  !waits[self];
  epoch = EPOCH(epoch + 1);
  for (p : 0 .. RANKS - 1) {
    if
    :: IS_MINE(p) -> store(self, FLAG(p, rank), EXPECTED, broken != SIGNAL)
    :: else
    fi
  }
}
inline await() {
  ALL_ARE_HERE;
  for (p : 0 .. RANKS - 1) {
    if
    :: IS_MINE(p) -> load(self, FLAG(rank, p), EXPECTED, broken != WAIT)
    :: else
    fi;
    if
    :: IS_MINE(p) && broken == RESET_FLAG ->
       flag[FLAG(rank, p)].found = flag[FLAG(rank, p)].last;
       store(self, FLAG(rank, p), START, false)
    :: else
    fi
  }
  if
  :: broken != LEAVE -> arrive(self, rank)
  :: else
  fi
}

inline run_one_shot() {
  atomic { !waits[self]; write_cell(self, STAGING(rank, SET(epoch), i), INPUT(k)); enter() };
  atomic { signal() };
  atomic { await() };
  atomic {
    !waits[self];
    for (q : 0 .. RANKS - 1) { read_cell(self, STAGING(q, SET(epoch + 1), i), INPUT(k)) }
    arrive(self, rank) /* the kernel ends */
  }
}

/* Between kernels of its own, whose threads have other elements. */
inline run_two_shot() {
  atomic {
    !waits[self];
    for (q : 0 .. RANKS - 1) { write_cell(self, TENSOR(rank, q, (i + 1) % THREADS), INPUT(k)) }
    arrive(self, rank)
  };
  atomic { !waits[self]; enter() };
  atomic { signal() };
  atomic { await() };
  atomic {
    !waits[self];
    for (q : 0 .. RANKS - 1) { read_cell(self, TENSOR(q, rank, i), INPUT(k)) }
    for (q : 0 .. RANKS - 1) { write_cell(self, TENSOR(q, rank, i), RESULT(k)) }
    if
    :: broken == REUSED_EPOCH -> epoch = EPOCH(epoch + 7)
    :: else
    fi;
    enter()
  };
  if
  :: broken != NO_LAST_BARRIER ->
     atomic { signal() };
     atomic { await() }
  :: else -> epoch = EPOCH(epoch + 1)
  fi;
  atomic { !waits[self]; arrive(self, rank) };
  atomic {
    !waits[self];
    for (q : 0 .. RANKS - 1) { read_cell(self, TENSOR(rank, q, (i + 1) % THREADS), RESULT(k)) }
  }
}

proctype thread(byte self) {
  byte rank = self / THREADS;
  byte i = self % THREADS;
  byte epoch = START;
  byte k;
  do
  :: k < KERNELS && kernel[k] == one_shot -> run_one_shot(); k++
  :: k < KERNELS && kernel[k] == two_shot -> run_two_shot(); k++
  :: k == KERNELS -> break
  od
}

init {
  byte k;
  atomic {
    choose_broken();
    start_views(START);
    for (k : 0 .. KERNELS - 1) {
      if
      :: kernel[k] = one_shot
      :: kernel[k] = two_shot
      fi
    }
    for (k : 0 .. ALL - 1) { run thread(k) }
  }
}
