//! Many devices and one have the same bits: ranks that share matrices, stages that share layers, replicas that share
//! windows, and all of them together. And what crosses between ranks is what the formula says.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ctq_container::LayerSource;
use ctq_convert::TiledCheckpoint;
use ctq_kernels::collective::{PeerCopies, Rank};
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::Cuda;
use ctq_kernels::cuda::emulated::{Emulated, Schedule};
use ctq_kernels::{Backend, Compute};
use ctq_model::spec::FfnSpec;
use ctq_model::window::Window;
use ctq_runtime::crew;
use ctq_runtime::{Acts, Engine, Error, Layout, Lockstep, Observer, Settings, Snapshot};
use ctq_tests::deeper::deeper;
use ctq_tests::{assets, crews, models};

const LENGTHS: [usize; 7] = [33, 20, 1, 40, 40, 17, 25];

fn windows(source: &dyn LayerSource) -> Vec<Window> {
    let vocabulary = source.inventory().spec.vocab;
    let window = |(index, length): (usize, &usize)| {
        let ids = (0..*length).map(|at| (((index + 5) * (at + 3) * 37) % vocabulary) as u32).collect();
        Window { index, start: index * 40, ids, scored: 1..*length }
    };
    LENGTHS.iter().filter(|length| **length > 1).enumerate().map(window).collect()
}

/// Every mode that a checkpoint can be run in.
fn modes(source: &TiledCheckpoint) -> Vec<Settings> {
    let mut modes =
        vec![models::settings(Acts::Off, Compute::F32), models::settings(Acts::Off, Compute::Bf16)];
    if source.inventory().quantizes_activations() {
        modes.push(models::settings(Acts::Library, Compute::F32));
        modes.push(models::settings(Acts::Kernel, Compute::F32));
    }
    modes
}

/// All layouts hold every checkpoint to the bits of one engine.
fn same_bits(folders: &[std::path::PathBuf], layouts: &[Layout]) {
    for folder in folders {
        let source = models::on_the_fly(folder);
        let windows = windows(&source);
        for settings in modes(&source) {
            let cpu = Cpu::detect();
            let plain = Engine::new(&cpu, &source, settings).score(&windows, usize::MAX, None, &());
            let plain = match plain {
                Ok(plain) => crews::bits(&plain),
                // Exact products are not there for every pair of schemes.
                Err(error) if settings.acts == Acts::Kernel => {
                    assert!(error.to_string().contains("--acts"), "{error}");
                    continue;
                }
                Err(error) => panic!("{}: {error}", folder.display()),
            };
            for layout in layouts {
                let found = crews::bits(&crews::on_cpu(&source, settings, *layout, &windows));
                assert!(found == plain, "{}: {settings:?}: {layout}", folder.display());
            }
        }
    }
}

fn layouts(replicas: &[usize], stages: &[usize], ranks: &[usize]) -> Vec<Layout> {
    let mut layouts = Vec::new();
    for replicas in replicas {
        for stages in stages {
            for ranks in ranks {
                layouts.push(Layout { replicas: *replicas, stages: *stages, ranks: *ranks });
            }
        }
    }
    layouts
}

#[test]
fn ranks_stages_and_their_products() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let names = [
        "bundled/bf16",
        "bundled/W4A16",
        "bundled/NVFP4",
        "bundled/FP8",
        "families/mixtral-sliding",
        "families/qwen3moe-nvfp4",
    ];
    let folders = names.map(|name| deeper(&assets::golden(name), parent.path(), 5));
    let layouts = layouts(&[1], &[1, 2, 3], &[1, 2, 3, 4, 8]);
    assert_eq!(layouts.len(), 15);
    same_bits(&folders, &layouts);
}

#[test]
fn replicas_of_stages_of_ranks() {
    let folders = ["bundled/NVFP4", "families/mixtral-sliding"].map(assets::golden);
    same_bits(&folders, &layouts(&[2, 3, 9], &[1, 2], &[1, 3]));
}

/// Biases, norms of heads, sliding windows, experts, key-value quantization: whatever a family has.
#[test]
fn every_family() {
    let folders = assets::with_oracle(&assets::golden("families"));
    assert!(folders.len() >= 15);
    same_bits(
        &folders,
        &[Layout { replicas: 1, stages: 1, ranks: 3 }, Layout { replicas: 1, stages: 2, ranks: 2 }],
    );
}

/// Every scheme of weights, activations and key-value caches that the fixtures have.
#[test]
fn every_fixture() {
    let Some(fixtures) = assets::shared("fixtures") else { return };
    same_bits(&assets::with_oracle(&fixtures), &[Layout { replicas: 1, stages: 2, ranks: 3 }]);
}

/// Elements that one token makes a rank receive in one layer, were there as many ranks as elements: heads, output
/// projection, and the two halves of the feed-forward part; or of experts the router's logits, the inner results of those
/// that the token goes to, and their sum.
fn crossing(source: &dyn LayerSource, layer: usize) -> usize {
    let spec = &source.inventory().spec;
    let block = &spec.blocks[layer];
    let heads = block.attention.heads * block.attention.head_dim;
    heads
        + spec.hidden
        + match &block.ffn {
            FfnSpec::Gated(gated) => gated.width + spec.hidden,
            FfnSpec::Moe { experts, top_k, .. } => experts.len() + top_k * experts[0].width + spec.hidden,
        }
}

#[test]
fn what_crosses_is_what_the_formula_says() {
    const TOKENS: usize = 24;
    for name in ["bundled/W4A16", "families/mixtral-sliding"] {
        let source = models::on_the_fly(&assets::golden(name));
        let settings = models::settings(Acts::Off, Compute::F32);
        let hidden = source.inventory().spec.hidden;
        for ranks in [1, 2, 4] {
            let layout = Layout { ranks, ..Layout::ONE };
            let team = crew::ranks(&layout, Cpu::detect);
            let one = std::num::NonZero::<usize>::MIN;
            let received = ctq_kernels::collective::team::run(&team, one, |rank: &Rank<Cpu>| {
                let engine = Engine::new(rank, &source, settings);
                let values: Vec<f32> = (0..TOKENS * hidden).map(|at| (at % 13) as f32 / 13.0).collect();
                let before = rank.received();
                engine.layer(0, &values)?;
                Ok::<_, Error>(rank.received() - before)
            });
            let received: u64 = received.into_iter().map(|received| received.expect("a layer")).sum();
            // All ranks together lack everything once but each its own part.
            let formula = TOKENS * crossing(&source, 0) * 4 * (ranks - 1);
            assert_eq!(received, formula as u64, "{name} on {ranks} ranks");
        }
    }
}

/// One rank finds what no other does: all end, and the run says what was found.
#[test]
fn what_one_rank_finds_ends_the_run() {
    let source = models::on_the_fly(&assets::golden("bundled/W4A16"));
    let mut windows = windows(&source);
    windows[4].ids[2] = 1 << 20;
    let settings = models::settings(Acts::Off, Compute::F32);
    for layout in layouts(&[1, 2], &[1, 2], &[1, 2]) {
        let model = crews::Model { source: &source, settings, resources: crews::PLENTY };
        let outcome = crews::run(model, layout, &windows, || crew::ranks(&layout, Cpu::detect), |_| {});
        let error = outcome.err().expect("a token without embedding");
        assert!(matches!(error, Error::TokenOutOfRange { window: 4, .. }), "{layout}: {error}");
    }
}

/// One rank that has had a signal; what the first is given to keep.
struct Signalled {
    stops: bool,
    done: AtomicUsize,
    kept: Mutex<Option<Snapshot>>,
}

impl Signalled {
    fn new(stops: bool) -> Signalled {
        Signalled { stops, done: AtomicUsize::new(0), kept: Mutex::default() }
    }
}

impl Observer for Signalled {
    fn interrupted(&self) -> bool {
        self.stops && self.done.load(Ordering::SeqCst) >= 1
    }

    fn advanced(&self, layers: usize) {
        self.done.store(layers, Ordering::SeqCst);
    }

    fn snapshot(&self, snapshot: Snapshot) -> Result<(), Error> {
        *self.kept.lock().expect("no panic") = Some(snapshot);
        Ok(())
    }
}

/// A signal to any rank stops all after the same layer, and the first keeps what is done.
#[test]
fn a_signal_to_one_rank_stops_all_and_keeps_the_hidden_states() {
    let source = models::on_the_fly(&assets::golden("bundled/W4A16"));
    let windows = windows(&source);
    let settings = models::settings(Acts::Off, Compute::F32);
    let team = crew::ranks(&Layout { ranks: 3, ..Layout::ONE }, Cpu::detect);
    let signalled = [false, false, true].map(Signalled::new);
    let one = std::num::NonZero::<usize>::MIN;
    let outcomes = ctq_kernels::collective::team::run(&team, one, |rank| {
        let observer = &signalled[rank.peers().rank()];
        Engine::new(rank, &source, settings).score(&windows, usize::MAX, None, observer)
    });
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Interrupted))), "{outcomes:?}");
    let kept = signalled.map(|one| one.kept.into_inner().expect("no panic"));
    let snapshot = kept[0].clone().expect("hidden states");
    assert_eq!((snapshot.layer, kept[1].is_none(), kept[2].is_none()), (1, true, true));
    // It goes on from there with the same bits, on one rank too.
    let cpu = Cpu::detect();
    let score = |resume| Engine::new(&cpu, &source, settings).score(&windows, usize::MAX, resume, &());
    let (whole, resumed) = (score(None).expect("scores"), score(Some(snapshot)).expect("scores"));
    assert_eq!(crews::bits(&resumed), crews::bits(&whole));
}

#[test]
fn a_rank_that_fails_is_what_its_peers_are_told() {
    let team = crew::ranks(&Layout { ranks: 3, ..Layout::ONE }, Cpu::detect);
    let one = std::num::NonZero::<usize>::MIN;
    let outcomes = ctq_kernels::collective::team::run(&team, one, |rank| {
        if rank.peers().rank() == 1 {
            return Err("no room".to_owned());
        }
        rank.peers().exchange(vec![Vec::new(); 3]).map(drop).map_err(|error| error.to_string())
    });
    assert_eq!(outcomes[1], Err("no room".to_owned()));
    for told in [&outcomes[0], &outcomes[2]] {
        assert_eq!(told, &Err("rank 1: no room".to_owned()));
    }
}

/// CUDA devices that do not see one another's memory, and several ranks on one, by the kernels' emulation.
#[test]
fn emulated_devices() {
    let device = || Cuda::new(Emulated::new(Schedule::ALL[0]));
    for (name, acts) in [("bundled/NVFP4", Acts::Library), ("families/mixtral-sliding", Acts::Off)] {
        let source = models::on_the_fly(&assets::golden(name));
        let windows = &windows(&source)[..4];
        let settings = models::settings(acts, Compute::Bf16);
        let model = crews::Model { source: &source, settings, resources: crews::PLENTY };
        let scores = |layout: Layout, seats: &dyn Fn() -> Vec<Rank<Cuda<Emulated>>>| {
            let told = crews::run(model, layout, windows, seats, |_| {});
            crews::bits(&told.unwrap_or_else(|error| panic!("{name}: {layout}: {error}")).scores)
        };
        let plain = scores(Layout::ONE, &|| vec![Rank::alone(device())]);
        for layout in layouts(&[1], &[1, 2], &[2, 3]) {
            let teams = || (0..layout.replicas * layout.stages).flat_map(|_| PeerCopies::team(layout.ranks));
            let own = || teams().map(|team| Rank::new(device(), Box::new(team))).collect();
            assert!(scores(layout, &own) == plain, "{name}: {layout} on devices of their own");
            let one = device();
            let shared = || teams().map(|team| Rank::new(one.another_rank(), Box::new(team))).collect();
            assert!(scores(layout, &shared) == plain, "{name}: {layout} on one device");
        }
    }
}
