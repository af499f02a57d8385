//! The CUDA kernels, run on the CPU, against the CPU backend: every operation under every schedule that CUDA allows.

use ctq_kernels::check::{Area, Extent, Finding, Size, compare};
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::emulated::{CopyTime, Dense, Emulated, Schedule, ThreadOrder, Warpgroups};
use ctq_kernels::cuda::{AttentionPath, Cuda, LinearPath};

/// Fails with every finding that is out of bounds.
fn assert_sound(findings: &[Finding], schedule: Schedule) {
    let wrong: Vec<String> = findings
        .iter()
        .filter_map(|f| Some(format!("{} {}: {}", f.operation, f.case, f.failure.as_ref()?)))
        .collect();
    assert!(
        wrong.is_empty(),
        "{} of {} wrong under {schedule:?}:\n{}",
        wrong.len(),
        findings.len(),
        wrong.join("\n")
    );
    assert!(findings.len() > 200, "only {} cases were run", findings.len());
}

fn hold(order: ThreadOrder, copies: CopyTime) {
    let schedule = Schedule { order, copies };
    let cuda = Cuda::new(Emulated::new(schedule));
    assert_sound(&compare(&cuda, &Cpu::detect(), Area::ALL, Size::Small, Extent::Everything), schedule);
}

#[test]
fn depth_first_with_eager_copies() {
    hold(ThreadOrder::DepthFirst, CopyTime::Eager);
}

#[test]
fn depth_first_with_lazy_copies() {
    hold(ThreadOrder::DepthFirst, CopyTime::Lazy);
}

#[test]
fn in_lock_step_with_eager_copies() {
    hold(ThreadOrder::LockStep, CopyTime::Eager);
}

#[test]
fn in_lock_step_with_lazy_copies() {
    hold(ThreadOrder::LockStep, CopyTime::Lazy);
}

#[test]
fn last_thread_first_with_eager_copies() {
    hold(ThreadOrder::LastFirst, CopyTime::Eager);
}

#[test]
fn last_thread_first_with_lazy_copies() {
    hold(ThreadOrder::LastFirst, CopyTime::Lazy);
}

/// Products of every scheme on warpgroups.
fn hold_on_warpgroups(order: ThreadOrder) {
    for copies in [CopyTime::Eager, CopyTime::Lazy] {
        let schedule = Schedule { order, copies };
        let device = Emulated::new(schedule).with_warpgroups(Warpgroups::Present);
        let cuda = Cuda::new(device).with_linears(Some(LinearPath::Hopper));
        let cuda = cuda.with_attention(Some(AttentionPath::Hopper));
        let areas = [Area::Attention, Area::Products, Area::Heads, Area::Fused];
        assert_sound(&compare(&cuda, &Cpu::detect(), &areas, Size::Small, Extent::Everything), schedule);
    }
}

#[test]
fn on_warpgroups_depth_first() {
    hold_on_warpgroups(ThreadOrder::DepthFirst);
}

#[test]
fn on_warpgroups_in_lock_step() {
    hold_on_warpgroups(ThreadOrder::LockStep);
}

#[test]
fn on_warpgroups_last_thread_first() {
    hold_on_warpgroups(ThreadOrder::LastFirst);
}

/// With a library for dense products, large linears are decoded into a scratch first.
#[test]
fn with_a_library_for_dense_products() {
    let schedule = Schedule::ALL[0];
    let cuda = Cuda::new(Emulated::new(schedule).with_dense_product(Dense::Present));
    assert_sound(&compare(&cuda, &Cpu::detect(), Area::ALL, Size::Small, Extent::Everything), schedule);
}
