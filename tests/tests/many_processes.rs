//! Ranks that reach one another over TCP have the bits of one engine: dense and with experts, in every mode of activation
//! quantization, as ranks and as stages. Here each is a thread with connections of its own; the program's own tests start
//! processes.

use std::net::TcpListener;
use std::num::NonZero;
use std::sync::Mutex;

use ctq_cluster::{Launch, Launcher, Limits, OverHost, Secret, World};
use ctq_container::LayerSource;
use ctq_convert::TiledCheckpoint;
use ctq_kernels::Compute;
use ctq_kernels::collective::{Pipe, Rank};
use ctq_kernels::cpu::Cpu;
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::crew::{self, Job, Member, Watcher};
use ctq_runtime::{Acts, Engine, Error, Layout, Seat, Settings, Workers};
use ctq_tests::{assets, crews, models};

const LENGTHS: [usize; 5] = [30, 12, 25, 30, 9];

fn windows(source: &dyn LayerSource) -> Vec<Window> {
    let vocabulary = source.inventory().spec.vocab;
    let window = |(index, length): (usize, &usize)| {
        let ids = (0..*length).map(|at| (((index + 2) * (at + 9) * 41) % vocabulary) as u32).collect();
        Window { index, start: index * 30, ids, scored: 1..*length }
    };
    LENGTHS.iter().enumerate().map(window).collect()
}

/// Keeps what one process scores.
#[derive(Default)]
struct Keep(Mutex<Vec<WindowScores>>);

impl Watcher for Keep {
    fn scored(&self, _: Seat, scores: Vec<WindowScores>) -> Result<(), Error> {
        self.0.lock().expect("no panic").extend(scores);
        Ok(())
    }
}

fn joined(rank: usize, ranks: usize, port: u16) -> std::sync::Arc<World> {
    let launch = Launch {
        launcher: Launcher::Torchrun,
        rank,
        ranks,
        local_rank: rank,
        local_ranks: Some(ranks),
        address: "127.0.0.1".to_owned(),
        port,
        secret: Secret::new("of this test"),
    };
    World::join(&launch, "1", Limits::default()).expect("a world")
}

/// The part of one process.
fn scores_of(
    world: &World,
    source: &TiledCheckpoint,
    settings: Settings,
    layout: Layout,
) -> Vec<WindowScores> {
    let seat = layout.seat(world.rank());
    let stage: Vec<usize> = layout.stage_of(seat).collect();
    let neighbour = |stage: usize| layout.index(Seat { stage, ..seat });
    let member = || {
        let from = |stage| Box::new(world.pipe_from(neighbour(stage), 2)) as Box<dyn Pipe>;
        let to = |stage| Box::new(world.pipe_to(neighbour(stage), 2)) as Box<dyn Pipe>;
        Ok(vec![Member {
            seat,
            backend: Rank::new(Cpu::detect(), Box::new(OverHost::new(world.group(&stage, 1)))),
            incoming: seat.stage.checked_sub(1).map(from),
            outgoing: (seat.stage + 1 < layout.stages).then(|| to(seat.stage + 1)),
            workers: Workers::anywhere(NonZero::<usize>::MIN),
        }])
    };
    let job = Job { source, settings, vocabulary: usize::MAX, layout, resources: crews::PLENTY };
    let keep = Keep::default();
    crew::run(&job, windows(source), member, &keep).unwrap_or_else(|error| panic!("{layout}: {error}"));
    keep.0.into_inner().expect("no panic")
}

#[test]
fn over_tcp_the_bits_are_those_of_one_engine() {
    let layouts = [
        Layout { replicas: 1, stages: 1, ranks: 2 },
        Layout { replicas: 1, stages: 2, ranks: 2 },
        Layout { replicas: 2, stages: 2, ranks: 1 },
        Layout { replicas: 1, stages: 1, ranks: 4 },
    ];
    let names = [
        "bundled/NVFP4",
        "bundled/FP8",
        "families/mixtral-sliding",
        "families/qwen3moe-nvfp4",
        "families/llama-kv-fp8",
    ];
    let sources = names.map(|name| models::on_the_fly(&assets::golden(name)));
    // Ports that the system gives to no outgoing connection.
    let mut ports = (20_000 + (std::process::id() % 1_000) as u16 * 10..30_010)
        .filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    for layout in layouts {
        let port = ports.next().expect("a free port");
        // Every process goes through the same runs, over the same connections.
        let found: Vec<Vec<Vec<WindowScores>>> = std::thread::scope(|scope| {
            let process = |rank| {
                let sources = &sources;
                scope.spawn(move || {
                    let world = joined(rank, layout.seats(), port);
                    let runs =
                        runs(sources).map(|(source, settings)| scores_of(&world, source, settings, layout));
                    let scores: Vec<_> = runs.collect();
                    world.leave();
                    scores
                })
            };
            let processes: Vec<_> = (0..layout.seats()).map(process).collect();
            processes.into_iter().map(|process| process.join().expect("a process")).collect()
        });
        for (index, (source, settings)) in runs(&sources).enumerate() {
            let cpu = Cpu::detect();
            let plain = Engine::new(&cpu, source, settings).score(&windows(source), usize::MAX, None, &());
            let mut all: Vec<WindowScores> = found.iter().flat_map(|runs| runs[index].clone()).collect();
            all.sort_by_key(|scores| scores.window);
            assert!(
                crews::bits(&all) == crews::bits(&plain.expect("scores")),
                "run {index}: {settings:?}: {layout}"
            );
        }
    }
}

fn runs(sources: &[TiledCheckpoint]) -> impl Iterator<Item = (&TiledCheckpoint, Settings)> {
    let modes = |source: &TiledCheckpoint| {
        let acts: &[Acts] = if source.inventory().quantizes_activations() {
            &[Acts::Off, Acts::Library, Acts::Kernel]
        } else {
            &[Acts::Off]
        };
        acts.iter().map(|acts| models::settings(*acts, Compute::Bf16)).collect::<Vec<_>>()
    };
    sources.iter().flat_map(move |source| modes(source).into_iter().map(move |mode| (source, mode)))
}
