//! Threads: the caller's own plus a team of helpers, all taking numbered tasks from a counter.
//!
//! Which thread runs a task is left to chance; what a task computes, and where it puts it, is not.
//!
//! A call takes 0.1 ms, so waiting for a sleeping thread would cost as much as it saves (a wake-up takes 50 us on a
//! virtual machine). Hence a team of our own and not a pool made for long work: helpers stay awake for `LINGER` after a
//! call, which covers the way from a forward to its backward, and the caller never waits for a helper that has not
//! begun: it closes the gate and leaves. rayon's scope, in this place before, waits until every job it spawned has been
//! taken up by somebody.

use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a helper watches for the next call before it sleeps. (PyTorch's OpenMP threads do so for milliseconds.)
const LINGER: Duration = Duration::from_micros(200);

/// Runs `task(state, i)` for every `i` in `0..tasks`, on at most `threads` threads, each with its own `state`.
pub fn for_each<S>(tasks: usize, threads: usize, state: impl Fn() -> S + Sync, task: impl Fn(&mut S, usize) + Sync) {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut index = next.fetch_add(1, Ordering::Relaxed);
        if index >= tasks {
            return;
        }
        let mut state = state();
        while index < tasks {
            task(&mut state, index);
            index = next.fetch_add(1, Ordering::Relaxed);
        }
    };
    let helpers = threads.min(tasks).saturating_sub(1);
    if helpers > 0 { team().run(helpers, &work) } else { work() }
}

type Work<'a> = &'a (dyn Fn() + Sync);

/// The gate is one word: the call's number above, whether it is open, and how many helpers are inside.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const CALL: u64 = 1 << 32;

struct Team {
    gate: AtomicU64,
    /// The open call's work, and how many helpers may take part. Written before the gate opens, read behind it.
    work: AtomicPtr<Work<'static>>,
    helpers: AtomicUsize,
    panicked: AtomicBool,
    /// Held by the caller that uses the team; another one meanwhile works alone.
    busy: Mutex<()>,
    members: Vec<Member>,
}

#[derive(Default)]
struct Member {
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Team {
    fn run(&self, helpers: usize, work: Work<'_>) {
        let Ok(guard) = self.busy.try_lock() else { return work() };
        // SAFETY: only the lifetime changes. Helpers use the reference between entering the open gate and leaving it,
        // and this function returns after it has closed the gate and seen the last of them leave.
        let mut work_ref: Work<'static> = unsafe { std::mem::transmute::<Work<'_>, Work<'static>>(work) };
        self.work.store(&raw mut work_ref, Ordering::Relaxed);
        self.helpers.store(helpers, Ordering::Relaxed);
        let call = (self.gate.load(Ordering::Relaxed) / CALL) as u32;
        self.gate.store((u64::from(call.wrapping_add(1)) * CALL) | OPEN, Ordering::SeqCst);
        for member in self.members.iter().take(helpers) {
            if member.asleep.load(Ordering::SeqCst)
                && let Some(thread) = member.thread.get()
            {
                thread.unpark();
            }
        }
        // Even if it panics here, the helpers must be out before the stack goes away.
        let own = catch_unwind(AssertUnwindSafe(work));
        self.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.gate.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            if spins.is_multiple_of(4096) { thread::yield_now() } else { spin_loop() }
        }
        let theirs = self.panicked.swap(false, Ordering::Relaxed);
        drop(guard);
        match own {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => assert!(!theirs, "a helper thread panicked"),
        }
    }

    /// A helper's life.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            let call = self.wait(index, seen);
            seen = call;
            if index >= self.helpers.load(Ordering::Relaxed) || !self.enter(call) {
                continue;
            }
            // SAFETY: inside the gate of this call, so the caller is in `run`, and its reference is alive.
            let work = unsafe { *self.work.load(Ordering::Relaxed) };
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.gate.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Until there is another open call than `seen`; its number.
    fn wait(&self, index: usize, seen: u64) -> u64 {
        let news = || {
            let gate = self.gate.load(Ordering::SeqCst);
            (gate & OPEN != 0 && gate / CALL != seen).then_some(gate / CALL)
        };
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if let Some(call) = news() {
                    return call;
                }
                spin_loop();
            }
            if start.elapsed() > LINGER {
                let asleep = &self.members[index].asleep;
                asleep.store(true, Ordering::SeqCst);
                // Looked at once more after saying so: a caller either saw the flag, or opened before this look.
                let call = loop {
                    if let Some(call) = news() {
                        break call;
                    }
                    thread::park();
                };
                asleep.store(false, Ordering::SeqCst);
                return call;
            }
        }
    }

    /// Enters the gate of `call`, unless it has closed.
    fn enter(&self, call: u64) -> bool {
        let mut gate = self.gate.load(Ordering::Acquire);
        while gate & OPEN != 0 && gate / CALL == call {
            match self.gate.compare_exchange_weak(gate, gate + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(current) => gate = current,
            }
        }
        false
    }
}

/// The process's one team, started by the first call that wants it.
///
/// A forked child has the parent's memory but none of its threads. It works alone: nobody enters its gate, and a team
/// that was busy while its process forked stays locked.
fn team() -> &'static Team {
    static TEAM: OnceLock<Team> = OnceLock::new();
    static STARTED: OnceLock<()> = OnceLock::new();
    let helpers = || thread::available_parallelism().map_or(1, usize::from) - 1;
    let team = TEAM.get_or_init(|| Team {
        gate: AtomicU64::new(0),
        work: AtomicPtr::new(ptr::null_mut()),
        helpers: AtomicUsize::new(0),
        panicked: AtomicBool::new(false),
        busy: Mutex::new(()),
        members: (0..helpers()).map(|_| Member::default()).collect(),
    });
    STARTED.get_or_init(|| {
        for (index, member) in team.members.iter().enumerate() {
            let name = format!("flowdppo-{index}");
            // Where no thread can be started the caller does the work of all.
            let Ok(handle) = thread::Builder::new().name(name).spawn(move || team.serve(index)) else { break };
            let _ = member.thread.set(handle.thread().clone());
        }
    });
    team
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_task_runs_once_for_any_number_of_threads() {
        for threads in [0, 1, 2, 3, 64] {
            for tasks in [0, 1, 2, 100] {
                let ran: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                let count = |(): &mut (), index: usize| {
                    ran[index].fetch_add(1, Ordering::Relaxed);
                };
                for_each(tasks, threads, || (), count);
                assert!(ran.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn concurrent_callers_and_sleeping_helpers() {
        thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    for round in 0..200 {
                        let sum = AtomicUsize::new(0);
                        let add = |(): &mut (), index: usize| {
                            sum.fetch_add(index, Ordering::Relaxed);
                        };
                        for_each(100, 3, || (), add);
                        assert_eq!(sum.into_inner(), 4950);
                        if round % 50 == caller {
                            thread::park_timeout(2 * LINGER); // long enough for the helpers to go to sleep
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        for _ in 0..3 {
            let fails = |(): &mut (), index: usize| assert!(index != 7, "task seven");
            let result = catch_unwind(AssertUnwindSafe(|| for_each(100, 4, || (), fails)));
            assert!(result.is_err());
        }
        let ran = AtomicUsize::new(0);
        let count = |(): &mut (), _| {
            ran.fetch_add(1, Ordering::Relaxed);
        };
        for_each(100, 4, || (), count);
        assert_eq!(ran.into_inner(), 100);
    }
}
