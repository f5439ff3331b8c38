/* Deadlines and `abort` of signal.cuh: KERNELS kernels one after the other on RANKS ranks of BLOCKS blocks, each of them
 * one-shot or two-shot, with one of these faults at any time:
 *
 *   - a rank dies: nothing of it moves any more;
 *   - nobody dies, and a deadline passes although the others are only slow;
 *   - a host sets `abort` in its rank's pad.
 *
 * The deadline of one rank may pass at any look that does not find the flag, those of the others only when nothing else
 * moves any more; and not when somebody has given up, for then it is `abort` that frees them. The stream of a rank that
 * gave up goes on: the tensor's owner overwrites it.
 *
 * Proved: every kernel of every living rank ends; who has given up writes no data and no flag any more; flags only grow;
 * and a kernel that does not give up has the right result, whoever else does.
 *
 * A step ends where another rank's may make a difference. The threads of a block signal in any order, and look one after
 * the other; their wait ends as if all looked when the last one does, since flags and `abort` stay set.
 *
 * Stores are seen at once and in order here. What barrier.pml shows of acquires and releases holds until the first
 * abort; after it, this model relies on a kernel's stores being seen before the next kernel of its stream begins. */

/* What may be broken. */
#define NO_ABORT 1       /* waits do not look at `abort` */
#define NO_DEADLINE 2    /* waits have no deadline */
#define NO_LOOK_AFTER 3  /* a wait that finds its flag does not look at `abort` again */
#define NO_LOOK_FIRST 4  /* a kernel does not look at `abort` before it begins */
#define OWN_ABORT 5      /* who gives up sets `abort` in its own pad only */

mtype = { one_shot, two_shot, begins, enters, awaits, reads, writes, gives_up, ends };
mtype kernel[KERNELS];
byte broken;
#define NOBODY RANKS
byte mortal = NOBODY;   /* who may die */
byte hurried = NOBODY;  /* whose deadline is short */
bit dead;
bit somebody_gave_up;

/* flags: by rank and block, as `barrier` of signal_pad.hpp. tensor: by the rank and block that reduce it. staging: by
 * set and block. */
typedef Pad { bit abort; byte flags[RANKS * BLOCKS]; byte epoch[BLOCKS] };
typedef Data { byte tensor[RANKS * BLOCKS]; byte staging[2 * BLOCKS] };
Pad pad[RANKS];
Data data[RANKS];

/* A rank's stream: a kernel begins when all blocks of the one before have ended. */
byte num_ended[RANKS];  /* blocks, of all kernels */
bit fails[RANKS];       /* a block of the kernel that runs gave up */
bit failed[RANKS];      /* a kernel before it did */
bit is_wrong[RANKS];    /* what a block of the kernel that runs has read */
hidden byte q, c;

#define INPUT(k) (2 * (k) + 2)
#define RESULT(k) (2 * (k) + 3)
#define WRONG 255

#define BY(r) ((r) * BLOCKS + block)
#define HAS_COME(r) ((r) == rank || pad[rank].flags[BY(r)] >= epoch)
#define MUST_SIGNAL(p) ((todo >> (p)) & 1)
#if RANKS == 2
#define ALL_HAVE_COME (HAS_COME(0) && HAS_COME(1))
#else
#define ALL_HAVE_COME (HAS_COME(0) && HAS_COME(1) && HAS_COME(2))
#endif
#define SEES_ABORT (pad[rank].abort && broken != NO_ABORT)

/* Its own flag needs no signal here. */
inline enter_barrier() {
  epoch++;
  todo = ((1 << RANKS) - 1) & ~(1 << rank)
}
inline signal(p) {
  assert(!failed[rank]);
  assert(pad[p].flags[BY(rank)] < epoch);
  pad[p].flags[BY(rank)] = epoch;
  todo = todo & ~(1 << (p))
}
inline stage() {
  assert(!failed[rank]);
  if
  :: kernel[k] == one_shot -> data[rank].staging[epoch % 2 * BLOCKS + block] = INPUT(k)
  :: else
  fi
}
inline read_staging() {
  for (q : 0 .. RANKS - 1) {
    is_wrong[rank] = is_wrong[rank] || data[q].staging[(epoch + 1) % 2 * BLOCKS + block] != INPUT(k)
  }
}
inline read_tensors() {
  is_right = true;
  for (q : 0 .. RANKS - 1) { is_right = is_right && data[q].tensor[BY(rank)] == INPUT(k) }
}
inline write_tensors() {
  assert(!failed[rank]);
  for (q : 0 .. RANKS - 1) { data[q].tensor[BY(rank)] = (is_right -> RESULT(k) : WRONG) }
}

/* The last block ends the kernel; then the owner overwrites the tensor for the next one. */
inline end_kernel() {
  num_ended[rank]++;
  if
  :: num_ended[rank] == (k + 1) * BLOCKS ->
     for (c : 0 .. RANKS * BLOCKS - 1) {
       assert(fails[rank] || kernel[k] == one_shot || data[rank].tensor[c] == RESULT(k));
       data[rank].tensor[c] = INPUT(k + 1)
     }
     assert(fails[rank] || !is_wrong[rank]);
     failed[rank] = failed[rank] || fails[rank];
     fails[rank] = false;
     is_wrong[rank] = false
  :: else
  fi;
  k++; epoch = 0; is_second = false; is_right = false; peer = 0;
  at = begins
}

proctype run_block(byte rank, block) provided (!(dead && mortal == (_pid - 1) / BLOCKS)) {
  mtype at = begins;
  byte k, epoch, todo, peer;
  bit is_second, is_right;
end: /* of a dead rank; init sees to the others */
  do
  :: atomic { at == begins && k < KERNELS && num_ended[rank] >= k * BLOCKS ->
       epoch = pad[rank].epoch[block];
       at = (SEES_ABORT && broken != NO_LOOK_FIRST -> gives_up : enters)
     }
  :: atomic { at == enters -> stage(); enter_barrier(); at = awaits }
  :: atomic { MUST_SIGNAL(0) -> signal(0) }
  :: atomic { MUST_SIGNAL(1) -> signal(1) }
#if RANKS > 2
  :: atomic { MUST_SIGNAL(2) -> signal(2) }
#endif
  :: atomic { at == awaits && !todo && ALL_HAVE_COME && (!SEES_ABORT || broken == NO_LOOK_AFTER) ->
       at = (is_second -> ends : reads)
     }
  :: atomic { at == awaits && SEES_ABORT -> at = gives_up }
  :: atomic { at == awaits && !ALL_HAVE_COME && hurried == rank && broken != NO_DEADLINE -> at = gives_up }
  :: atomic { timeout && at == awaits && broken != NO_DEADLINE -> assert(!somebody_gave_up); at = gives_up }
  :: atomic { at == reads && kernel[k] == one_shot -> read_staging(); at = ends }
  :: atomic { at == reads && kernel[k] == two_shot -> read_tensors(); at = writes }
  :: atomic { at == writes -> write_tensors(); is_second = true; enter_barrier(); at = awaits }
  :: atomic { at == gives_up && peer < RANKS ->
       fails[rank] = true;
       somebody_gave_up = true;
       pad[(rank + peer) % RANKS].abort = true;
       peer = (broken == OWN_ABORT -> RANKS : peer + 1)
     }
  :: atomic { at == gives_up && peer == RANKS && !todo -> end_kernel() }
  :: atomic { at == ends -> pad[rank].epoch[block] = epoch; end_kernel() }
  :: at == begins && k == KERNELS -> break
  od
}

#define HAS_ENDED(r) ((r) == mortal || num_ended[r] == KERNELS * BLOCKS)
#if RANKS == 2
#define ALL_HAVE_ENDED (HAS_ENDED(0) && HAS_ENDED(1))
#else
#define ALL_HAVE_ENDED (HAS_ENDED(0) && HAS_ENDED(1) && HAS_ENDED(2))
#endif

/* The first process, so that a block's number follows from its rank. */
init {
  byte r, b;
  bit host_aborts;
  atomic {
    c_code { now.broken = getenv("BROKEN") ? atoi(getenv("BROKEN")) : 0; };
    for (r : 0 .. KERNELS - 1) {
      if
      :: kernel[r] = one_shot
      :: kernel[r] = two_shot
      fi
    }
    for (r : 0 .. RANKS - 1) {
      for (b : 0 .. RANKS * BLOCKS - 1) { data[r].tensor[b] = INPUT(0) }
      for (b : 0 .. BLOCKS - 1) { run run_block(r, b) }
    }
    if
    :: hurried = 0
    :: hurried = 0; select (mortal : 1 .. RANKS - 1)
    :: host_aborts = true
    fi
  }
  if
  :: mortal != NOBODY -> dead = true
  :: host_aborts -> pad[0].abort = true
  :: else
  fi;
  ALL_HAVE_ENDED
}
