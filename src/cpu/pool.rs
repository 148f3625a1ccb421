//! Threads: the caller's own plus helpers of one rayon pool, all taking numbered tasks from a counter.
//!
//! Which thread runs a task is left to chance; what a task computes, and where it puts it, is not.

use std::process;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Runs `task(state, i)` for every `i` in `0..tasks`, on at most `threads` threads, each with its own `state`.
///
/// The calling thread works too, so that a call never waits for a sleeping helper to wake before it starts.
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
    match if helpers > 0 { pool() } else { None } {
        None => work(),
        Some(pool) => pool.in_place_scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|_| work());
            }
            work();
        }),
    }
}

struct Owned {
    process: u32,
    pool: ThreadPool,
}

/// This process's pool. A forked child has the parent's memory but none of its threads, and would wait for them
/// forever: it gets a pool of its own. None where no thread can be started; the caller then works alone.
fn pool() -> Option<&'static ThreadPool> {
    static CURRENT: AtomicPtr<Owned> = AtomicPtr::new(ptr::null_mut());
    let current = CURRENT.load(Ordering::Acquire);
    // SAFETY: either null or leaked below, hence valid forever and never written again.
    if let Some(owned) = unsafe { current.as_ref() }
        && owned.process == process::id()
    {
        return Some(&owned.pool);
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let name = |index| format!("flowdppo-{index}");
    let fresh = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().ok()?;
    let fresh = Box::into_raw(Box::new(Owned { process: process::id(), pool: fresh }));
    match CURRENT.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: just leaked, and from here on never freed.
        Ok(_) => Some(unsafe { &(*fresh).pool }),
        Err(_) => {
            // SAFETY: another thread of this process installed its pool first; `fresh` was never shared.
            drop(unsafe { Box::from_raw(fresh) });
            pool()
        }
    }
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
                for_each(
                    tasks,
                    threads,
                    || (),
                    |(), index| {
                        ran[index].fetch_add(1, Ordering::Relaxed);
                    },
                );
                assert!(ran.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn concurrent_callers_do_not_disturb_each_other() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let sum = AtomicUsize::new(0);
                    for_each(
                        1000,
                        3,
                        || (),
                        |(), index| {
                            sum.fetch_add(index, Ordering::Relaxed);
                        },
                    );
                    assert_eq!(sum.into_inner(), 499_500);
                });
            }
        });
    }
}
