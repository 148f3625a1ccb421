//! Threads: numbered tasks that the threads of a team take from one counter. Which thread runs a task is left to chance;
//! what a task computes, and where it puts it, is not.
//!
//! There are no threads of our own. A call borrows
//! - **PyTorch's OpenMP team**, in a process on Linux that has imported PyTorch. OpenMP's threads spin on their cores for
//!   milliseconds after each of PyTorch's operators, and threads of another team would have to wait for these cores;
//! - **rayon's pool** in any other process; also on macOS, where PyTorch brings LLVM's OpenMP, whose entry point
//!   `__kmpc_fork_call` is meant for compilers;
//! - **no team**, and the caller does all tasks, in a child that was forked after its parent had used rayon.
//!
//! `fork` copies memory but no threads, and a team waits forever for threads that did not come along. Nobody can ask
//! libgomp whether PyTorch used its team before a fork. So a child that was forked after the import of this library
//! never uses it, and takes rayon. (If the import comes after the fork, a call hangs where PyTorch's operators hang.)

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Runs `task(state, i)` for every `i` in `0..tasks`, on at most `threads` threads, each with its own `state`.
///
/// A panic ends the share of its thread and is the caller's once the other threads have done the remaining tasks.
pub fn for_each<S>(tasks: usize, threads: usize, state: impl Fn() -> S + Sync, task: impl Fn(&mut S, usize) + Sync) {
    let next = AtomicUsize::new(0);
    share(tasks.min(threads), Team::of_this_process, &|| {
        let mut index = next.fetch_add(1, Ordering::Relaxed);
        if index >= tasks {
            return;
        }
        let mut state = state();
        while index < tasks {
            task(&mut state, index);
            index = next.fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// As `for_each`; what the tasks return, in their order.
pub fn map<S, R: Send + Sync>(
    tasks: usize, threads: usize, state: impl Fn() -> S + Sync, task: impl Fn(&mut S, usize) -> R + Sync,
) -> Vec<R> {
    let results: Vec<OnceLock<R>> = (0..tasks).map(|_| OnceLock::new()).collect();
    for_each(tasks, threads, state, |state, index| drop(results[index].set(task(state, index))));
    results.into_iter().map(|result| result.into_inner().expect("every task ran")).collect()
}

/// Runs `task` for every row. One takes ~50 ns: worth a thread from thousands of rows on.
pub fn for_each_row(rows: usize, threads: usize, task: impl Fn(usize) + Sync) {
    const ROWS: usize = 2048;
    let part = |(): &mut (), part: usize| (part * ROWS..rows.min((part + 1) * ROWS)).for_each(&task);
    for_each(rows.div_ceil(ROWS), threads, || (), part);
}

/// Calls `work` on 1 to `threads` threads at a time, the caller's among them.
fn share(threads: usize, team: impl FnOnce() -> Team, work: Work<'_>) {
    if threads <= 1 {
        return work();
    }
    let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
    let caught = || {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(work)) {
            panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    };
    match team() {
        Team::OpenMp(gomp_parallel) => on_openmp(gomp_parallel, threads, &caught),
        Team::Rayon(pool) => pool.in_place_scope(|scope| {
            // A job beyond the pool's threads would only wait for one of them.
            for _ in 0..pool.current_num_threads().min(threads - 1) {
                scope.spawn(|_| caught());
            }
            caught();
        }),
        Team::None => caught(),
    }
    if let Some(payload) = panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(payload);
    }
}

type Work<'a> = &'a (dyn Fn() + Sync);

#[derive(Clone, Copy)]
enum Team {
    OpenMp(GompParallel),
    Rayon(&'static ThreadPool),
    None,
}

impl Team {
    fn of_this_process() -> Team {
        let process = process::id();
        let openmp = if process == importing_process() { find_gomp_parallel() } else { None };
        openmp.map(Team::OpenMp).or_else(|| rayon_pool(process).map(Team::Rayon)).unwrap_or(Team::None)
    }
}

/// The process that imported this library, or called it first: not a child that was forked later.
pub fn importing_process() -> u32 {
    static PROCESS: OnceLock<u32> = OnceLock::new();
    *PROCESS.get_or_init(process::id)
}

/// `GOMP_parallel(function, data, num_threads, flags)` of libgomp: calls `function(data)` once on every thread of a
/// team, the calling thread among them, and returns when all calls have. Within another parallel region the calling
/// thread is the whole team.
type GompParallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// The one that PyTorch's operators call. PyTorch loads its libgomp, whatever the file's name, into the global scope.
#[cfg(target_os = "linux")]
fn find_gomp_parallel() -> Option<GompParallel> {
    static FOUND: OnceLock<GompParallel> = OnceLock::new();
    FOUND.get().copied().or_else(|| {
        // Not found is not remembered: PyTorch may be imported later.
        //
        // SAFETY: a global symbol of this name is libgomp's function, or a replacement for it with its arguments, as
        // compilers call it by that name. It stays valid, because Python does not unload PyTorch's libraries.
        let found = unsafe { *libloading::os::unix::Library::this().get::<GompParallel>(b"GOMP_parallel\0").ok()? };
        Some(*FOUND.get_or_init(|| found))
    })
}

#[cfg(not(target_os = "linux"))]
fn find_gomp_parallel() -> Option<GompParallel> {
    None
}

/// Calls `work` on the OpenMP threads that come first, `threads` of them at most.
///
/// The team always has the size that PyTorch's operators give it, even if there are fewer tasks: libgomp ends the
/// threads that a smaller team does not need, and PyTorch's next operator would wait for new ones (0.5 ms for 6).
fn on_openmp(gomp_parallel: GompParallel, threads: usize, work: Work<'_>) {
    let came = AtomicUsize::new(0);
    let limited = || {
        if came.fetch_add(1, Ordering::Relaxed) < threads {
            work();
        }
    };
    let mut data: Work<'_> = &limited;
    const SIZE_OF_PYTORCH: c_uint = 0;
    // SAFETY: `call_work` gets the address of a `Work`, as it demands. `data` lives on this stack until `GOMP_parallel`
    // returns, which is after the last call.
    unsafe { gomp_parallel(call_work, (&raw mut data).cast(), SIZE_OF_PYTORCH, 0) };
}

/// # Safety
///
/// `data` is the address of a `Work`, which nobody changes during the call.
unsafe extern "C" fn call_work(data: *mut c_void) {
    // SAFETY: the caller promises that a `Work` is there, and several threads may read it at once.
    let work = unsafe { *data.cast::<Work<'_>>() };
    // `share` has put a `catch_unwind` around it: nothing unwinds into libgomp.
    work();
}

/// A pool that leaves one processor to the caller; none on a single processor, or where no thread can be started.
fn rayon_pool(process: u32) -> Option<&'static ThreadPool> {
    static STARTED_BY: AtomicU32 = AtomicU32::new(0);
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    // Before `POOL` is touched: a fork may have come while another thread of the parent was starting it.
    let starter = STARTED_BY.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed);
    if starter.is_err_and(|starter| starter != process) {
        return None;
    }
    let start = || {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let builder = ThreadPoolBuilder::new().num_threads(processors - 1).thread_name(|i| format!("flowdppo-{i}"));
        // To rayon, 0 threads would mean as many as it likes.
        if processors > 1 { builder.build().ok() } else { None }
    };
    POOL.get_or_init(start).as_ref()
}

#[cfg(test)]
#[path = "../../tests/unit/cpu_threads.rs"]
mod tests;
