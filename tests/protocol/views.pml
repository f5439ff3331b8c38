/* What threads may see of each other: release and acquire on flags, data races on cells. Included by the models, which
 * define RANKS, THREADS (of a block), FLAGS, CELLS and KEPT (messages of a flag that a reader may still find).
 *
 * SPIN runs all interleavings, but of a machine whose stores are seen at once. So what a thread may know is written out
 * here, as C++ defines it and as PTX does for accesses of one scope:
 *
 *   view     each thread has a vector clock: how much of every thread's work happens before what it does next
 *   flag     a list of messages; a release puts the writer's view into its message, a relaxed store does not; a load
 *            may find any message that is no older than the last one it found; an acquire adds the message's view to
 *            the reader's, a relaxed load does not
 *   cell     data: its last write and the last read of each thread; an access that is not ordered after the write, or
 *            a write not ordered after every read, is a data race and fails an assertion
 *
 * A wait is a statement that blocks until some message will do: that is a spin without its turns. A thread gives way
 * only before it waits: what it does from one wait to the next is made of acquires, accesses to data, and releases, in
 * this order, and such a sequence is atomic if there is no race (Lipton, "Reduction", 1975). */

#define ALL (RANKS * THREADS)

/* Epochs wrap around here at 8, so that they do so within a run; signal.cuh's do at 2^32. */
#define EPOCH(e) ((e) & 7)
#define HAS_REACHED(seen, expected) (EPOCH((seen) + 8 - (expected)) < 4)

/* What is wrong with this run's protocol: 0 is nothing. From the environment, so that a model is compiled once. */
byte broken;
inline choose_broken() {
  c_code { now.broken = getenv("BROKEN") ? atoi(getenv("BROKEN")) : 0; }
}

typedef View { byte at[ALL] };
typedef Message { byte value; byte view[ALL] };
typedef Flag { Message at[KEPT]; byte last; byte found };
typedef Cell { byte writer; byte written; byte read[ALL]; byte version };

View seen[ALL];
Flag flag[FLAGS];
Cell cell[CELLS];

/* Of atomic steps only, so no part of the state. */
hidden byte u_, v_, m_, first_;

inline start_views(epoch) {
  for (u_ : 0 .. ALL - 1) { seen[u_].at[u_] = 1 }
  for (u_ : 0 .. FLAGS - 1) { flag[u_].at[0].value = EPOCH(epoch) }
}

inline store(t, f, epoch, releases) {
  assert(flag[f].last - flag[f].found + 1 < KEPT); /* or the model forgets too early */
  flag[f].last++;
  m_ = flag[f].last % KEPT;
  flag[f].at[m_].value = EPOCH(epoch);
  for (u_ : 0 .. ALL - 1) { flag[f].at[m_].view[u_] = (releases -> seen[t].at[u_] : 0) }
  seen[t].at[t]++
}

#define VALUE(f, m) flag[f].at[(m) % KEPT].value
#define ARRIVED(f, epoch) HAS_REACHED(VALUE(f, flag[f].last), EPOCH(epoch))

/* After ARRIVED. What can be found no more is forgotten, so that states which differ in nothing else are one. */
inline load(t, f, epoch, acquires) {
  m_ = flag[f].found;
  do
  :: m_ < flag[f].last -> m_++
  :: HAS_REACHED(VALUE(f, m_), EPOCH(epoch)) -> break
  od;
  for (v_ : 1 .. m_ - flag[f].found) {
    for (u_ : 0 .. ALL - 1) { flag[f].at[(m_ - v_) % KEPT].view[u_] = 0 }
    VALUE(f, m_ - v_) = 0
  }
  flag[f].found = m_;
  m_ = m_ % KEPT;
  for (u_ : 0 .. ALL - 1) {
    if
    :: acquires && flag[f].at[m_].view[u_] > seen[t].at[u_] -> seen[t].at[u_] = flag[f].at[m_].view[u_]
    :: else
    fi
  }
}

inline read_cell(t, c, wanted) {
  assert(cell[c].written <= seen[t].at[cell[c].writer]); /* the write happens before this read */
  assert(cell[c].version == (wanted));
  cell[c].read[t] = seen[t].at[t]
}

inline write_cell(t, c, new) {
  assert(cell[c].written <= seen[t].at[cell[c].writer]);
  for (u_ : 0 .. ALL - 1) {
    assert(cell[c].read[u_] <= seen[t].at[u_]); /* every read happens before this write */
    cell[c].read[u_] = 0
  }
  cell[c].writer = t;
  cell[c].written = seen[t].at[t];
  cell[c].version = new
}

/* __syncthreads, and the end of a kernel: arrive, and go on once !waits[self]. The last thread of a rank to arrive wakes
 * the others. */
byte arrived[RANKS];
bit waits[ALL];
inline arrive(t, r) {
  waits[t] = 1;
  arrived[r]++;
  if
  :: arrived[r] == THREADS ->
     arrived[r] = 0;
     first_ = r * THREADS;
     for (u_ : 0 .. ALL - 1) {
       for (v_ : first_ .. first_ + THREADS - 1) {
         if
         :: seen[v_].at[u_] > seen[first_].at[u_] -> seen[first_].at[u_] = seen[v_].at[u_]
         :: else
         fi
       }
       for (v_ : first_ .. first_ + THREADS - 1) { seen[v_].at[u_] = seen[first_].at[u_] }
     }
     for (v_ : first_ .. first_ + THREADS - 1) { seen[v_].at[v_]++; waits[v_] = 0 }
  :: else
  fi
}
