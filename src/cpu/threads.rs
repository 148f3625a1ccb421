//! Numbered tasks, which threads take from one counter: chance decides which thread runs a task, but not what it
//! computes or where it writes. A call runs on
//! - **PyTorch's OpenMP team**, on Linux, in a process that has imported PyTorch. Its threads spin on their cores for
//!   milliseconds after each of PyTorch's operators; threads of another team would wait for these cores;
//! - **this library's rayon pool** in any other process; also on macOS, where PyTorch has LLVM's OpenMP, whose entry
//!   point `__kmpc_fork_call` is meant for compilers;
//! - **the caller's thread alone**, where there is no pool: on a single processor, or in a child forked after its
//!   parent used the pool. (`fork` copies no threads, and a team waits forever for missing ones.)
//!
//! Nobody can ask libgomp whether PyTorch used its team before a fork. So a child forked after the import of this
//! library takes rayon. (If the import comes after the fork, a call hangs where PyTorch's operators hang.)

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Runs `task(state, i)` for every `i` in `0..tasks`, on at most `threads` threads, each with its own `state`. A panic
/// ends the share of its thread, and is passed on when the other threads have done the remaining tasks.
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

/// As `for_each`; returns the results in the order of the tasks.
pub fn map<S, R: Send + Sync>(
    tasks: usize, threads: usize, state: impl Fn() -> S + Sync, task: impl Fn(&mut S, usize) -> R + Sync,
) -> Vec<R> {
    let results: Vec<OnceLock<R>> = (0..tasks).map(|_| OnceLock::new()).collect();
    for_each(tasks, threads, state, |state, index| drop(results[index].set(task(state, index))));
    results.into_iter().map(|result| result.into_inner().expect("every task ran")).collect()
}

/// Runs `task` for every row, 2048 rows at a time: one takes ~50 ns, too little to hand out alone.
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
            // More jobs than the pool has threads would only wait.
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

/// The process that imported this library: `lib.rs` calls this first. Not a child forked later.
pub fn importing_process() -> u32 {
    static PROCESS: OnceLock<u32> = OnceLock::new();
    *PROCESS.get_or_init(process::id)
}

/// `GOMP_parallel(function, data, num_threads, flags)` of libgomp: calls `function(data)` once on each thread of a
/// team, the caller's included, and returns when all have. In a parallel region the team is the caller alone.
type GompParallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// The function that PyTorch's operators call: PyTorch loads its libgomp, whatever the file's name, globally.
#[cfg(target_os = "linux")]
fn find_gomp_parallel() -> Option<GompParallel> {
    static FOUND: OnceLock<GompParallel> = OnceLock::new();
    FOUND.get().copied().or_else(|| {
        // A failure is not remembered: PyTorch may be imported later.
        // SAFETY: a global symbol of this name is libgomp's function, or one that compilers may call in its place. It
        // stays valid: Python does not unload PyTorch's libraries.
        let found = unsafe { *libloading::os::unix::Library::this().get::<GompParallel>(b"GOMP_parallel\0").ok()? };
        Some(*FOUND.get_or_init(|| found))
    })
}

#[cfg(not(target_os = "linux"))]
fn find_gomp_parallel() -> Option<GompParallel> {
    None
}

/// Calls `work` on the first `threads` OpenMP threads that come. The team always has PyTorch's size: libgomp ends the
/// threads that a smaller one does not use, and PyTorch's next operator waits for new ones (0.5 ms for 6).
fn on_openmp(gomp_parallel: GompParallel, threads: usize, work: Work<'_>) {
    let came = AtomicUsize::new(0);
    let limited = || {
        if came.fetch_add(1, Ordering::Relaxed) < threads {
            work();
        }
    };
    let mut data: Work<'_> = &limited;
    const SIZE_OF_PYTORCH: c_uint = 0;
    // SAFETY: `call_work` gets the address of a `Work`, which outlives `GOMP_parallel` and with it every call.
    unsafe { gomp_parallel(call_work, (&raw mut data).cast(), SIZE_OF_PYTORCH, 0) };
}

/// # Safety
/// `data` is the address of a `Work`, which nobody changes during the call.
unsafe extern "C" fn call_work(data: *mut c_void) {
    // SAFETY: the caller promises that a `Work` is there; several threads may read it at once.
    let work = unsafe { *data.cast::<Work<'_>>() };
    // Nothing unwinds into libgomp: `share` has put a `catch_unwind` around the work.
    work();
}

/// Leaves one processor to the caller. None where the caller works alone, or where no thread can be started.
fn rayon_pool(process: u32) -> Option<&'static ThreadPool> {
    static STARTED_BY: AtomicU32 = AtomicU32::new(0);
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    // Before `POOL` is touched: a fork while another thread starts the pool leaves it locked in the child.
    let starter = STARTED_BY.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed);
    if starter.is_err_and(|starter| starter != process) {
        return None;
    }
    let start = || {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let builder = ThreadPoolBuilder::new().num_threads(processors - 1).thread_name(|i| format!("flowdppo-{i}"));
        // 0 threads would let rayon choose their number.
        if processors > 1 { builder.build().ok() } else { None }
    };
    POOL.get_or_init(start).as_ref()
}

#[cfg(test)]
#[path = "../../tests/unit/cpu_threads.rs"]
mod tests;
