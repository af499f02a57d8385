//! What is read from the disk while a layer runs: the part after it, asked for before anybody waits for it, and nothing
//! that is on the device already.

use std::sync::Mutex;

use ctq_container::{LayerSource, PartTiles, SourceError};
use ctq_convert::TiledCheckpoint;
use ctq_kernels::Compute;
use ctq_kernels::cpu::Cpu;
use ctq_model::Inventory;
use ctq_model::inventory::Part;
use ctq_model::window::Window;
use ctq_runtime::{Acts, Engine, HiddenPlace, Observer, Schedule};
use ctq_tests::{assets, models};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    Prefetch(Part),
    Read(Part),
    /// So many layers are done.
    Done(usize),
}

/// A source and an observer that write down in which order they are called.
struct Recording {
    source: TiledCheckpoint,
    calls: Mutex<Vec<Call>>,
}

impl Recording {
    fn note(&self, call: Call) {
        self.calls.lock().expect("no panic").push(call);
    }

    fn at(calls: &[Call], call: Call) -> usize {
        calls.iter().position(|it| *it == call).unwrap_or_else(|| panic!("{call:?} is not among {calls:?}"))
    }
}

impl LayerSource for Recording {
    fn inventory(&self) -> &Inventory {
        self.source.inventory()
    }

    fn part(&self, part: Part) -> Result<PartTiles, SourceError> {
        self.note(Call::Read(part));
        self.source.part(part)
    }

    fn prefetch(&self, part: Part) {
        self.note(Call::Prefetch(part));
        self.source.prefetch(part);
    }
}

impl Observer for Recording {
    fn advanced(&self, layers: usize) {
        self.note(Call::Done(layers));
    }
}

#[test]
fn the_next_part_is_asked_for_before_a_layer_is_done() {
    let source = models::on_the_fly(&assets::golden("bundled/W4A16"));
    let layers = source.inventory().spec.blocks.len();
    let tied = source.inventory().spec.tied();
    let recording = Recording { source, calls: Mutex::default() };
    let cpu = Cpu::detect();
    let schedule =
        Schedule { batch_tokens: usize::MAX, hidden: HiddenPlace::Device, resident_layers: usize::MAX };
    let settings = models::settings(Acts::Off, Compute::Bf16);
    let engine = Engine::new(&cpu, &recording, settings).with_schedule(schedule);
    let windows = [Window { index: 0, start: 0, ids: vec![1, 2, 3, 4], scored: 1..4 }];
    // One worker: nothing is loaded before the layer is done, and the disk must not wait for that.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let score = || engine.score(&windows, usize::MAX, None, &recording).expect("scores");
    pool.install(score);
    let calls = std::mem::take(&mut *recording.calls.lock().expect("no panic"));
    let at = |call| Recording::at(&calls, call);
    for layer in 1..layers {
        assert!(at(Call::Prefetch(Part::Layer(layer))) < at(Call::Read(Part::Layer(layer))));
        assert!(at(Call::Prefetch(Part::Layer(layer))) < at(Call::Done(layer)));
    }
    let head = if tied { Part::Embedding } else { Part::Head };
    assert!(tied || at(Call::Prefetch(head)) < at(Call::Done(layers)));

    // A second group: everything is on the device.
    pool.install(score);
    let again = recording.calls.lock().expect("no panic");
    assert!(again.iter().all(|call| matches!(call, Call::Done(_))), "{again:?}");
}
