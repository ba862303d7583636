// SPDX-License-Identifier: GPL-2.0-only
//! How a CPU is shared by threads that have nothing to do with UMCG: what each gets, and how long who sleeps has to wait.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::time::{ClockId, clock_gettime};

use crate::clock::{Samples, now};

/// Beside the one that sleeps.
const HOGS: usize = 4;
const NAP: Duration = Duration::from_millis(1);

/// Of the threads that compare what they get.
const NICE: [i32; 4] = [-5, 0, 0, 5];
/// What the kernel gives them of a CPU, in its own table (`sched_prio_to_weight`).
const WEIGHT: [f64; NICE.len()] = [3121.0, 1024.0, 1024.0, 335.0];
const SHARED_FOR: Duration = Duration::from_secs(4);

/// From the end of a sleep of 1 ms to the next user instruction, on a CPU where 4 threads compute.
pub(crate) fn sleeper(rounds: u32) -> Samples {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..HOGS {
            scope.spawn(|| compute_until(&stop));
        }
        let samples = scope.spawn(|| {
            let mut samples = Samples::default();
            for _ in 0..rounds {
                let end = now() + NAP.as_nanos() as u64;
                thread::sleep(NAP);
                samples.add(end, now());
            }
            samples
        });
        let samples = samples.join().expect("it does not panic");
        stop.store(true, SeqCst);
        samples
    })
}

/// Threads of several nice values compute on one CPU: by how many percent of its due the one is off that is off most.
pub(crate) fn unfairness() -> Result<f64> {
    let (stop, start) = (AtomicBool::new(false), Barrier::new(NICE.len() + 1));
    let times = thread::scope(|scope| {
        let threads = NICE.map(|nice| {
            let (stop, start) = (&stop, &start);
            scope.spawn(move || {
                // SAFETY: takes no pointers; 0 is the calling thread.
                let set = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
                start.wait();
                ensure!(set == 0, "cannot become nice {nice}: {}", std::io::Error::last_os_error());
                Ok(compute_until(stop))
            })
        });
        start.wait();
        thread::sleep(SHARED_FOR);
        stop.store(true, SeqCst);
        threads.map(|thread| thread.join().expect("it does not panic"))
    });
    let mut off_by: f64 = 0.0;
    let times = times.into_iter().collect::<Result<Vec<_>>>()?;
    let (all, weights) = (times.iter().sum::<Duration>().as_secs_f64(), WEIGHT.iter().sum::<f64>());
    for (time, weight) in times.iter().zip(WEIGHT) {
        let due = all * weight / weights;
        off_by = off_by.max((time.as_secs_f64() / due - 1.0).abs() * 100.0);
    }
    eprintln!("CPU time at nice {NICE:?}: {times:.3?}");
    Ok(off_by)
}

/// The CPU time of the thread in the end.
fn compute_until(stop: &AtomicBool) -> Duration {
    while !stop.load(SeqCst) {
        std::hint::black_box(stop); // no spin_loop(): emulators take a pause for it
    }
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every Linux has it").into()
}
