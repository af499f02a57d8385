//! A device that has no room: the run is planned again with less and scores the same, and ends with what it would need
//! where one window at a time does not fit.

use std::path::Path;

use ctq_container::LayerSource;
use ctq_convert::TiledCheckpoint;
use ctq_kernels::Compute;
use ctq_kernels::cpu::Cpu;
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::Resources;
use ctq_runtime::crew;
use ctq_runtime::{Acts, Engine, Error, Layout, Needs, Pool, plan};
use ctq_tests::cramped::{Cramped, WANTED};
use ctq_tests::crews::{self, Told};
use ctq_tests::{assets, models};

const LENGTHS: [usize; 6] = [40, 100, 7, 64, 90, 33];
const LONGEST: usize = 100;

const PLENTY: u64 = 1 << 40;
const POOLS: [Pool; 2] = [Pool::Shared(PLENTY), Pool::Separate { device: PLENTY, host: PLENTY }];

/// A dense checkpoint and one with experts.
fn checkpoints() -> [TiledCheckpoint; 2] {
    ["bundled/NVFP4", "families/mixtral-sliding"].map(|name| models::on_the_fly(&assets::golden(name)))
}

fn windows(source: &TiledCheckpoint) -> Vec<Window> {
    let vocabulary = source.inventory().spec.vocab;
    let window = |(index, length): (usize, &usize)| {
        let ids = (0..*length).map(|at| (((index + 3) * (at + 7) * 31) % vocabulary) as u32).collect();
        Window { index, start: index * LONGEST, ids, scored: 1..*length }
    };
    LENGTHS.iter().enumerate().map(window).collect()
}

fn plain(source: &TiledCheckpoint) -> Vec<WindowScores> {
    let (cpu, settings) = (Cpu::detect(), models::settings(Acts::Off, Compute::F32));
    Engine::new(&cpu, source, settings).score(&windows(source), usize::MAX, None, &()).expect("scores")
}

/// All scores of a run and what it told of new plans. `scored` is called after each group with the number of windows that
/// are scored.
fn run(
    backend: &Cramped,
    source: &TiledCheckpoint,
    pool: Pool,
    layout: Layout,
    scored: impl Fn(usize) + Sync,
) -> Result<Told, Error> {
    let settings = models::settings(Acts::Off, Compute::F32);
    let model = crews::Model { source, settings, resources: Resources { pool, scratch: 0 } };
    let seats = || crew::ranks(&layout, || backend.clone());
    crews::run(model, layout, &windows(source), seats, scored)
}

fn assert_same(found: &[WindowScores], plain: &[WindowScores]) {
    let bits = |scores: &[WindowScores]| -> Vec<(usize, Vec<u64>)> {
        scores.iter().map(|s| (s.window, s.nll.iter().map(|nll| nll.to_bits()).collect())).collect()
    };
    assert_eq!(bits(found), bits(plain));
}

#[test]
fn a_run_goes_on_with_less_and_scores_the_same() {
    for source in checkpoints() {
        let plain = plain(&source);
        for pool in POOLS {
            let told = run(&Cramped::new(LONGEST + 20), &source, pool, Layout::ONE, |_| {}).expect("scores");
            assert_same(&told.scores, &plain);
            let last = told.replanned.last().expect("told");
            assert_eq!((last.device.as_str(), last.wanted, last.windows), ("cramped", WANTED, LENGTHS.len()));
            let (groups, tokens) = (last.groups, last.batch_tokens);
            assert_eq!(
                last.to_string(),
                format!(
                    "cramped had no room for 12345 more bytes: going on with less memory, 6 windows in {groups} groups, {tokens} tokens at a time"
                )
            );
        }
    }
}

/// One seat without room ends the attempt of all; what others have scored stays.
#[test]
fn several_seats_go_on_with_less_together() {
    let layout = Layout { replicas: 2, stages: 1, ranks: 2 };
    for source in checkpoints() {
        let told = run(&Cramped::new(LONGEST), &source, POOLS[0], layout, |_| {}).expect("scores");
        assert_same(&told.scores, &plain(&source));
        assert!(!told.replanned.is_empty());
    }
}

#[test]
fn what_is_scored_before_stays_scored() {
    for source in checkpoints() {
        let needs = Needs::of(source.inventory());
        // Two or three windows a group; room goes when some are scored.
        let pool = Pool::Shared(170 * (needs.hidden + needs.activations_on_host));
        let groups = plan(&needs, pool, 0, &LENGTHS).expect("a plan").groups;
        assert!((2..=4).contains(&groups.len()), "{groups:?}");
        let backend = Cramped::new(usize::MAX);
        let told = run(&backend, &source, pool, Layout::ONE, |_| backend.limit(LONGEST)).expect("scores");
        assert_same(&told.scores, &plain(&source));
        let first = told.replanned.first().expect("the second group does not fit");
        assert_eq!(first.windows, LENGTHS.len() - groups[0].len());
    }
}

#[test]
fn where_one_window_has_no_room_the_run_ends_with_what_it_needs() {
    for source in checkpoints() {
        for pool in POOLS {
            let error = run(&Cramped::new(LONGEST - 1), &source, pool, Layout::ONE, |_| {});
            let error = error.err().expect("no room");
            let Error::NoRoom { device, wanted, needed } = &error else { panic!("{error}") };
            assert_eq!((device.as_str(), *wanted), ("cramped", WANTED));
            assert!(*needed > 0);
            for told in [needed.to_string().as_str(), "--ctx", "--device cpu"] {
                assert!(error.to_string().contains(told), "{error}");
            }
        }
    }
}

#[test]
fn a_device_too_small_for_one_window_is_told_before_anything_runs() {
    let source = models::on_the_fly(&assets::golden("bundled/NVFP4"));
    let pool = Pool::Separate { device: 1_000, host: PLENTY };
    let error = run(&Cramped::new(0), &source, pool, Layout::ONE, |_| {}).err().expect("too small");
    let Error::TooSmall(least) = &error else { panic!("{error}") };
    assert_eq!((least.tokens, least.budget), (LONGEST, 1_000));
    // With what it says is needed, there is a plan.
    let needs = Needs::of(source.inventory());
    let enough = Pool::Separate { device: least.needed, host: 0 };
    assert!(plan(&needs, enough, 0, &LENGTHS).is_ok());
}

/// The plan counts what the files hold.
#[test]
fn packed_bytes_are_those_of_the_parts() {
    let source = models::on_the_fly(Path::new(&assets::golden("bundled/W4A16")));
    let needs = Needs::of(source.inventory());
    assert_eq!(needs.layers.len(), source.inventory().spec.blocks.len());
    for (index, bytes) in needs.layers.iter().enumerate() {
        let part = source.part(ctq_model::inventory::Part::Layer(index)).expect("a layer");
        let stored = |matrix: &ctq_container::TiledMatrix| {
            let scales = matrix.scales.as_ref().map_or(0, |scales| scales.bytes.len());
            let zeros = matrix.zeros.as_ref().map_or(0, |zeros| zeros.len());
            let permutation = matrix.permutation.as_ref().map_or(0, |permutation| permutation.len());
            (matrix.codes.len() + scales + zeros + permutation) as u64
        };
        assert_eq!(*bytes, part.matrices.values().map(stored).sum::<u64>(), "layer {index}");
    }
}
