//! Tests of `src/cpu/threads.rs`.

use super::*;

/// A team of three, as libgomp would run it.
unsafe extern "C" fn three(
    function: unsafe extern "C" fn(*mut c_void), data: *mut c_void, _threads: c_uint, _: c_uint,
) {
    let data = &AtomicUsize::new(data.expose_provenance());
    // SAFETY: `data` is what the caller gave for `function`, and the threads end before this function returns.
    let call = || unsafe { function(std::ptr::with_exposed_provenance_mut(data.load(Ordering::Relaxed))) };
    thread::scope(|scope| {
        scope.spawn(call);
        scope.spawn(call);
        call();
    });
}

fn teams() -> [Team; 3] {
    [Team::OpenMp(three), Team::of_this_process(), Team::None]
}

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
fn no_more_threads_than_asked_for() {
    for team in teams() {
        for threads in [0, 1, 2, 3, 64] {
            let calls = AtomicUsize::new(0);
            share(threads, || team, &|| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
            assert!((1..=threads.max(1)).contains(&calls.into_inner()));
        }
    }
}

#[test]
fn concurrent_and_nested_callers() {
    let sum = |add: &(dyn Fn(usize) -> usize + Sync)| {
        let sum = AtomicUsize::new(0);
        let add = |(): &mut (), index: usize| {
            sum.fetch_add(add(index), Ordering::Relaxed);
        };
        for_each(100, 3, || (), add);
        sum.into_inner()
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!((0..200).all(|_| sum(&|index| index) == 4950)));
        }
    });
    assert_eq!(sum(&|_| sum(&|index| index)), 495_000);
}

#[test]
fn a_panic_reaches_the_caller_and_the_next_call_works() {
    for team in teams() {
        for _ in 0..3 {
            let fails = || share(3, || team, &|| panic!("of a task"));
            let payload = catch_unwind(AssertUnwindSafe(fails)).unwrap_err();
            assert_eq!(payload.downcast_ref(), Some(&"of a task"));
        }
        let calls = AtomicUsize::new(0);
        share(3, || team, &|| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert!(calls.into_inner() >= 1);
    }
    let fails = |(): &mut (), index: usize| assert!(index != 7, "task seven");
    assert!(catch_unwind(AssertUnwindSafe(|| for_each(100, 4, || (), fails))).is_err());
}
