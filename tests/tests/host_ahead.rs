//! The host runs ahead of a device: a layer costs no wait, and what is not finite is still told of as the first module,
//! window and position.

use std::num::NonZero;

use ctq_container::LayerSource;
use ctq_kernels::collective::team;
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::Cuda;
use ctq_kernels::cuda::emulated::{Emulated, Schedule as Emulation};
use ctq_kernels::{Backend, Compute};
use ctq_model::window::Window;
use ctq_runtime::{Acts, Engine, Error, HiddenPlace, Lockstep, Schedule, Snapshot};
use ctq_tests::deeper::deeper;
use ctq_tests::{assets, models};

/// Lengths of windows, of which two or three make a batch.
const LENGTHS: [usize; 5] = [40, 33, 21, 50, 9];
const SCHEDULE: Schedule =
    Schedule { batch_tokens: 64, hidden: HiddenPlace::Device, resident_layers: usize::MAX };

fn windows(vocabulary: usize) -> Vec<Window> {
    let window = |(index, length): (usize, &usize)| {
        let ids = (0..*length).map(|at| (at * 7919 + index) as u32 % vocabulary as u32).collect();
        Window { index: 10 * index, start: 0, ids, scored: 1..*length }
    };
    LENGTHS.iter().enumerate().map(window).collect()
}

fn emulated() -> Cuda<Emulated> {
    Cuda::new(Emulated::new(Emulation::ALL[1]))
}

/// Launches, and waits for everything that was queued, of a run over a model of `layers` layers.
fn run(layers: usize) -> (usize, usize) {
    let parent = tempfile::tempdir().expect("a folder");
    let folder = deeper(&assets::golden("bundled/W4A16"), parent.path(), layers);
    let source = models::on_the_fly(&folder);
    let settings = models::settings(Acts::Off, Compute::Bf16);
    let cuda = emulated();
    let (launches, waits) = (cuda.device().launches(), cuda.device().waits());
    let engine = Engine::new(&cuda, &source, settings).with_schedule(SCHEDULE);
    let windows = windows(source.inventory().spec.vocab);
    engine.score(&windows, usize::MAX, None, &()).expect("scores");
    (cuda.device().launches() - launches, cuda.device().waits() - waits)
}

#[test]
fn a_layer_costs_no_wait_and_few_launches() {
    let ((few, waits), (many, waits_of_many)) = (run(2), run(6));
    assert_eq!(waits_of_many, waits, "waits of four more layers");
    let batches = 3;
    // Norm, three products, two rotations, two operands of attention and attention itself, its operand, a product that
    // is added; norm, two products, gate, a product that is added.
    assert!(many - few <= 4 * batches * 16, "{} launches for four layers", many - few);
}

/// The error of a group whose hidden states before the first layer are not finite in two places.
fn told_of<B: Backend>(backend: &B, checkpoint: &str) -> (String, usize, usize) {
    let source = models::on_the_fly(&assets::golden(checkpoint));
    let settings = models::settings(Acts::Off, Compute::F32);
    let spec = &source.inventory().spec;
    let rows: usize = LENGTHS.iter().sum();
    let mut hidden: Vec<f32> = (0..rows * spec.hidden).map(|at| (at % 17) as f32 / 16.0 - 0.5).collect();
    let mut spoil = |window: usize, position: usize, value: f32| {
        let row = LENGTHS[..window].iter().sum::<usize>() + position;
        hidden[row * spec.hidden + 3] = value;
    };
    spoil(3, 2, f32::NAN);
    spoil(1, 20, f32::INFINITY);
    let engine = Engine::new(backend, &source, settings).with_schedule(SCHEDULE);
    let resume = Some(Snapshot { layer: 0, hidden });
    match engine.score(&windows(spec.vocab), usize::MAX, resume, &()) {
        Err(Error::NonFinite { module, window, position }) => (module, window, position),
        other => panic!("{checkpoint}: {:?}", other.map(|scores| scores.len())),
    }
}

#[test]
fn the_first_place_that_is_not_finite_is_told_whoever_computes() {
    for checkpoint in ["bundled/W4A16", "families/qwen3moe-nvfp4"] {
        let source = models::on_the_fly(&assets::golden(checkpoint));
        let expected = (source.inventory().spec.embedding.clone(), 10, 20);
        assert_eq!(told_of(&Cpu::detect(), checkpoint), expected);
        assert_eq!(told_of(&emulated(), checkpoint), expected);
        let cuda = emulated();
        let ranks = team::in_process(vec![cuda.another_rank(), cuda]);
        let all = team::run(&ranks, NonZero::<usize>::MIN, |rank| Ok::<_, Error>(told_of(rank, checkpoint)));
        for told in all {
            assert_eq!(told.expect("told"), expected, "{checkpoint}, two ranks");
        }
    }
}

#[test]
fn what_goes_into_a_layer_is_blamed_on_the_module_before() {
    for checkpoint in ["bundled/bf16", "families/mixtral-sliding"] {
        let source = models::on_the_fly(&assets::golden(checkpoint));
        let spec = &source.inventory().spec;
        let (cpu, cuda) = (Cpu::detect(), emulated());
        let settings = models::settings(Acts::Off, Compute::F32);
        let mut hidden = vec![0.25; 12 * spec.hidden];
        hidden[5 * spec.hidden + 1] = f32::NAN;
        let engines: [&dyn Lockstep; 2] =
            [&Engine::new(&cpu, &source, settings), &Engine::new(&cuda, &source, settings)];
        for (layer, before) in [(0, spec.embedding.as_str()), (1, spec.blocks[0].ffn_module())] {
            for engine in engines {
                match engine.layer(layer, &hidden) {
                    Err(Error::NonFinite { module, window: 0, position: 5 }) => {
                        assert_eq!(module, before, "{checkpoint}");
                    }
                    other => panic!("{checkpoint}: {:?}", other.map(|hidden| hidden.len())),
                }
            }
        }
    }
}
