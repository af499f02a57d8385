//! The same bits, however the work is cut: threads, tensor-parallel ranks, groups and batches of windows, containers,
//! interruptions and instruction sets. Every score of a run is compared bit for bit with one plain run.

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Mutex;

use ctq_container::LayerSource;
use ctq_convert::TiledCheckpoint;
use ctq_kernels::collective::team;
use ctq_kernels::cpu::{Cpu, Isa};
use ctq_kernels::{Backend, Compute};
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::{Acts, Engine, HiddenPlace, Observer, Schedule, Settings, Snapshot};
use ctq_tests::{assets, models};

/// Lengths of windows: the shortest that scores anything, around tiles of 64 keys, and none twice.
const LENGTHS: [usize; 7] = [97, 2, 64, 65, 130, 33, 3];

/// A checkpoint and the windows that it scores.
struct Subject {
    name: String,
    folder: PathBuf,
    source: TiledCheckpoint,
    windows: Vec<Window>,
}

impl Subject {
    fn open(folder: PathBuf) -> Subject {
        let source = models::on_the_fly(&folder);
        let windows = windows(source.inventory().spec.vocab, &LENGTHS);
        Subject { name: assets::name(&folder).to_owned(), source, windows, folder }
    }

    /// Every mode that means something for this checkpoint.
    fn settings(&self) -> Vec<Settings> {
        let acts: &[Acts] = if self.source.inventory().quantizes_activations() {
            &[Acts::Off, Acts::Library, Acts::Kernel]
        } else {
            &[Acts::Off]
        };
        let computes = [Compute::F32, Compute::Bf16];
        acts.iter().flat_map(|acts| computes.map(|compute| models::settings(*acts, compute))).collect()
    }

    /// One run over all windows at once, on the fly.
    fn plain(&self, settings: Settings) -> Vec<WindowScores> {
        self.score(&Cpu::detect(), &self.source, settings, self.windows.len())
    }

    /// A run on a backend, `group` windows at a time.
    fn score<B: Backend>(
        &self,
        backend: &B,
        source: &dyn LayerSource,
        settings: Settings,
        group: usize,
    ) -> Vec<WindowScores> {
        self.score_on(&Engine::new(backend, source, settings), group)
    }

    /// A run on an engine, `group` windows at a time.
    fn score_on<B: Backend>(&self, engine: &Engine<'_, B>, group: usize) -> Vec<WindowScores> {
        let groups = self.windows.chunks(group);
        let scores = groups.map(|windows| engine.score(windows, usize::MAX, None, &()));
        scores.flat_map(|scores| scores.unwrap_or_else(|error| panic!("{}: {error}", self.name))).collect()
    }

    fn assert_same(&self, how: &str, settings: Settings, found: &[WindowScores], plain: &[WindowScores]) {
        let same = found.len() == plain.len() && found.iter().zip(plain).all(|(a, b)| same_scores(a, b));
        let Settings { acts, compute } = settings;
        assert!(same, "{} with acts {acts} in {compute}: {how} gives other bits", self.name);
    }
}

fn same_scores(a: &WindowScores, b: &WindowScores) -> bool {
    let bits = |scores: &WindowScores| scores.nll.iter().map(|nll| nll.to_bits()).collect::<Vec<_>>();
    (a.window, a.first) == (b.window, b.first) && bits(a) == bits(b)
}

/// Windows of random tokens; some score everything but their first token, some only their second half.
fn windows(vocabulary: usize, lengths: &[usize]) -> Vec<Window> {
    let mut state = 7_u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % vocabulary as u32
    };
    let mut start = 0;
    let window = |(index, length): (usize, &usize)| {
        start += length;
        let first = if index % 2 == 0 { 1 } else { (length / 2).max(1) };
        let ids = (0..*length).map(|_| token()).collect();
        Window { index, start: start - length, ids, scored: first..*length }
    };
    lengths.iter().enumerate().map(window).collect()
}

/// A dense Llama, its NVFP4, GPTQ and static FP8 checkpoints, experts with and without quantized activations, keys and
/// values in fp8, int8 activations per token; act-order by group and fp8 blocks where the fixtures are.
fn subjects() -> Vec<Subject> {
    let bundled = ["bf16", "NVFP4", "W4A16", "FP8"].map(|name| assets::golden("bundled").join(name));
    let families = ["mixtral-sliding", "qwen3moe-nvfp4", "llama-kv-fp8", "llama-w4a8"]
        .map(|name| assets::golden("families").join(name));
    let fixtures = ["llama-w4a16-actorder-group", "llama-fp8-block"]
        .map(|name| assets::shared(&format!("fixtures/{name}")));
    let folders = bundled.into_iter().chain(families).chain(fixtures.into_iter().flatten());
    folders.map(Subject::open).collect()
}

/// Calls `check` with every checkpoint, every mode and the scores of a plain run.
fn for_each_mode(check: impl Fn(&Subject, Settings, &[WindowScores])) {
    for subject in subjects() {
        for settings in subject.settings() {
            check(&subject, settings, &subject.plain(settings));
        }
    }
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads")
}

#[test]
fn any_number_of_threads() {
    let pools = [1, 2, 3, 7].map(pool);
    for_each_mode(|subject, settings, plain| {
        for pool in &pools {
            let group = subject.windows.len();
            let found = pool.install(|| subject.score(&Cpu::detect(), &subject.source, settings, group));
            let threads = pool.current_num_threads();
            subject.assert_same(&format!("{threads} threads"), settings, &found, plain);
        }
    });
}

#[test]
fn any_grouping_of_windows() {
    for_each_mode(|subject, settings, plain| {
        for group in [1, 3] {
            let found = subject.score(&Cpu::detect(), &subject.source, settings, group);
            subject.assert_same(&format!("groups of {group}"), settings, &found, plain);
        }
    });
}

/// Batches of one window and of some, hidden states here and there, none, one and all layers kept.
const SCHEDULES: [Schedule; 5] = [
    Schedule { batch_tokens: 1, hidden: HiddenPlace::Device, resident_layers: 0 },
    Schedule { batch_tokens: 1, hidden: HiddenPlace::Host, resident_layers: 0 },
    Schedule { batch_tokens: 100, hidden: HiddenPlace::Host, resident_layers: 1 },
    Schedule { batch_tokens: 200, hidden: HiddenPlace::Device, resident_layers: usize::MAX },
    Schedule { batch_tokens: usize::MAX, hidden: HiddenPlace::Host, resident_layers: usize::MAX },
];

#[test]
fn any_schedule() {
    for_each_mode(|subject, settings, plain| {
        let cpu = Cpu::detect();
        for schedule in SCHEDULES {
            // Several groups through one engine: what it keeps of one serves the next.
            let engine = Engine::new(&cpu, &subject.source, settings).with_schedule(schedule);
            for group in [4, subject.windows.len()] {
                let found = subject.score_on(&engine, group);
                subject.assert_same(&format!("{schedule:?}, groups of {group}"), settings, &found, plain);
            }
        }
    });
}

#[test]
fn logits_in_any_schedule() {
    let subject = Subject::open(assets::golden("bundled/NVFP4"));
    let settings = models::settings(Acts::Library, Compute::F32);
    let rows: Vec<Vec<u32>> = subject.windows.iter().map(|window| window.ids.clone()).collect();
    let plain = models::logits(&subject.source, &rows, settings).expect("logits");
    let cpu = Cpu::detect();
    let sequences: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    for schedule in SCHEDULES {
        let mut found = Vec::new();
        let engine = Engine::new(&cpu, &subject.source, settings).with_schedule(schedule);
        engine
            .logits(&sequences, &(), |rows| {
                found.extend_from_slice(rows);
                Ok::<(), ctq_runtime::Error>(())
            })
            .expect("logits");
        let same = found.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same && found.len() == plain.len(), "{schedule:?} gives other logits");
    }
}

#[test]
fn a_container_and_the_checkpoint_it_was_made_from() {
    let out = tempfile::tempdir().expect("a temporary folder");
    for subject in subjects() {
        let container = models::converted(&subject.folder, &out.path().join(&subject.name));
        for settings in subject.settings() {
            let found = subject.score(&Cpu::detect(), &container, settings, subject.windows.len());
            subject.assert_same("the container", settings, &found, &subject.plain(settings));
        }
    }
}

#[test]
fn any_instruction_set() {
    let isas: Vec<Cpu> = Isa::ALL.into_iter().filter_map(Cpu::with_isa).collect();
    for mut subject in subjects() {
        subject.windows = windows(subject.source.inventory().spec.vocab, &[65, 2, 27]);
        for settings in subject.settings() {
            let plain = subject.plain(settings);
            for cpu in &isas {
                let found = subject.score(cpu, &subject.source, settings, subject.windows.len());
                subject.assert_same(&cpu.identity().isa, settings, &found, &plain);
            }
        }
    }
}

/// Keeps every snapshot of a run.
#[derive(Default)]
struct Keep(Mutex<Vec<Snapshot>>);

impl Observer for Keep {
    fn wants_snapshot(&self) -> bool {
        true
    }

    fn snapshot(&self, snapshot: Snapshot) -> Result<(), ctq_runtime::Error> {
        self.0.lock().expect("one thread at a time").push(snapshot);
        Ok(())
    }
}

#[test]
fn going_on_from_a_snapshot_after_any_layer() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for_each_mode(|subject, settings, plain| {
        let cpu = Cpu::detect();
        let engine = Engine::new(&cpu, &subject.source, settings);
        let keep = Keep::default();
        let watched = engine.score(&subject.windows, usize::MAX, None, &keep).expect("scores");
        subject.assert_same("being watched", settings, &watched, plain);
        let snapshots = keep.0.into_inner().expect("snapshots");
        let layers: Vec<usize> = snapshots.iter().map(|snapshot| snapshot.layer).collect();
        let blocks = subject.source.inventory().spec.blocks.len();
        assert_eq!(layers, (1..=blocks).collect::<Vec<_>>(), "{}", subject.name);
        for snapshot in &snapshots {
            let path = folder.path().join("snapshot");
            snapshot.save(&path, &subject.name).expect("saved");
            let read = Snapshot::load(&path, &subject.name).expect("the snapshot that was saved");
            // Whatever schedule it was taken in, it goes on in any other.
            let schedule = SCHEDULES[snapshot.layer % SCHEDULES.len()];
            let engine = Engine::new(&cpu, &subject.source, settings).with_schedule(schedule);
            let keep = Keep::default();
            let found = engine.score(&subject.windows, usize::MAX, Some(read), &keep).expect("scores");
            let later = keep.0.into_inner().expect("snapshots");
            assert!(later.iter().zip(&snapshots[snapshot.layer..]).all(|(a, b)| a == b), "{}", subject.name);
            subject.assert_same(&format!("going on after layer {}", snapshot.layer), settings, &found, plain);
        }
    });
}

/// Scales that are found at run time for all tokens at once are those of a window, not of a group.
#[test]
fn scales_that_all_tokens_share_do_not_see_other_windows() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let folder = models::dynamic_per_tensor(parent.path());
    let subject = Subject::open(folder);
    for settings in subject.settings() {
        let plain = subject.plain(settings);
        let alone = subject.score(&Cpu::detect(), &subject.source, settings, 1);
        subject.assert_same("each window alone", settings, &alone, &plain);
        let ranks = team::in_process(vec![Cpu::detect(); 3]);
        let found = team::run(&ranks, NonZero::<usize>::MIN, |rank| {
            Ok::<_, ctq_runtime::Error>(subject.score(rank, &subject.source, settings, 3))
        });
        for found in found {
            subject.assert_same("groups of 3 on 3 ranks", settings, &found.expect("scores"), &plain);
        }
    }
    // The scales are indeed found at run time: the static ones of the same weights score otherwise.
    let fixed = Subject::open(assets::golden("bundled/FP8"));
    let library = models::settings(Acts::Library, Compute::F32);
    assert!(!same_scores(&subject.plain(library)[0], &fixed.plain(library)[0]));
}
