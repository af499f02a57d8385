//! The CUDA engine within a budget of device memory, without a GPU: what is planned is enough, whatever stays on the
//! device and whatever passes through, and the scores are those of the CPU engine.

use ctq_container::LayerSource;
use ctq_convert::TiledCheckpoint;
use ctq_kernels::Compute;
use ctq_kernels::collective::Rank;
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::Cuda;
use ctq_kernels::cuda::emulated::{Emulated, Schedule};
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::Resources;
use ctq_runtime::{Acts, Engine, HiddenPlace, Layout, Needs, Pool};
use ctq_tests::{assets, crews, models};

const WINDOWS: usize = 8;
const TOKENS: usize = 60;

/// What the backend takes beside what is planned: logits of a group in f32, tables of angles.
const SCRATCH: u64 = 2 << 20;

fn windows(source: &TiledCheckpoint) -> Vec<Window> {
    let vocabulary = source.inventory().spec.vocab;
    let window = |index: usize| {
        let ids = (0..TOKENS).map(|at| (((index + 5) * (at + 3) * 37) % vocabulary) as u32).collect();
        Window { index, start: index * TOKENS, ids, scored: 1..TOKENS }
    };
    (0..WINDOWS).map(window).collect()
}

fn bits(scores: &[WindowScores]) -> Vec<u64> {
    scores.iter().flat_map(|scores| &scores.nll).map(|nll| nll.to_bits()).collect()
}

#[test]
fn what_is_planned_is_enough() {
    for name in ["bundled/NVFP4", "bundled/W4A16", "families/mixtral-sliding"] {
        let source = models::on_the_fly(&assets::golden(name));
        let settings = models::settings(Acts::Off, Compute::F32);
        let cpu = Cpu::detect();
        let plain = Engine::new(&cpu, &source, settings).score(&windows(&source), usize::MAX, None, &());
        let plain = bits(&plain.expect("scores"));
        let needs = Needs::of(source.inventory());
        let token = needs.hidden + needs.activations;
        // All layers stay; they pass through; hidden states wait on the host; one window at a time.
        let pass = needs.layers.iter().sum::<u64>().max(needs.embedding).max(needs.head);
        let all = (WINDOWS * TOKENS) as u64;
        let budgets = [
            (needs.all + all * token, 1 << 40),
            (pass + 3 * TOKENS as u64 * token, 1 << 40),
            (pass + 3 * TOKENS as u64 * token, 0),
            (pass + TOKENS as u64 * token, 0),
        ];
        let mut seen = Vec::new();
        for (device, host) in budgets {
            let device = SCRATCH + device;
            let cuda = Cuda::new(Emulated::new(Schedule::ALL[0]).with_capacity(device as usize));
            let resources = Resources { pool: Pool::Separate { device, host }, scratch: SCRATCH };
            let model = crews::Model { source: &source, settings, resources };
            let seats = || vec![Rank::alone(cuda.another_rank())];
            let told = crews::run(model, Layout::ONE, &windows(&source), seats, |_| {});
            let told = told.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(told.replanned.is_empty(), "{name} with {device} and {host} bytes: {:?}", told.replanned);
            let schedule = told.plans[0].replicas[0].stages[0].schedule;
            seen.push((schedule.resident_layers > 0, schedule.hidden));
            let scores = told.scores;
            assert_eq!(bits(&scores), plain, "{name} with {device} bytes");
        }
        assert!(seen.iter().any(|(resident, _)| *resident) && seen.iter().any(|(resident, _)| !resident));
        assert!(seen.iter().any(|(_, hidden)| *hidden == HiddenPlace::Host), "{name}: {seen:?}");
    }
}
