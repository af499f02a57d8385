//! `ctq eval --dry-run`: which windows, layers and rows go to which device, what that takes, what crosses between devices,
//! and how large a model could be. Runs nothing.

use comfy_table::{CellAlignment, Table, presets};
use ctq_model::Inventory;
use ctq_model::window::Window;
use ctq_runtime::crew::Job;
use ctq_runtime::{Layout, Needs, Operations, Plans, Pool, Seat, Work, handed_on, received_in_layer};
use serde::Serialize;

use crate::floor::Floor;
use crate::report;

/// What is printed, and written as JSON: a stable object.
#[derive(Debug, Serialize)]
pub(crate) struct DryRun {
    dry_run_version: u32,
    model: String,
    acts: String,
    layout: String,
    why: String,
    replicas: usize,
    pp: usize,
    tp: usize,
    windows: usize,
    tokens: usize,
    packed_bytes: u64,
    threads: usize,
    /// Where the bytes that may be taken come from.
    memory: String,
    seats: Vec<SeatPlan>,
    /// Arithmetic, where it is the CPU's.
    #[serde(skip_serializing_if = "Option::is_none")]
    work: Option<Floor>,
    traffic: Traffic,
    largest: Option<Largest>,
}

/// One seat.
#[derive(Debug, Serialize)]
struct SeatPlan {
    replica: usize,
    stage: usize,
    rank: usize,
    device: String,
    windows: usize,
    groups: usize,
    batch_tokens: usize,
    first_layer: usize,
    layers: usize,
    /// Part of the rows of every matrix.
    rows: String,
    weight_bytes: u64,
    /// Where weights are: `resident` on the device, `passing` through it, or `mapped` from their files.
    weights: &'static str,
    device_bytes: u64,
    host_bytes: u64,
    budget_bytes: u64,
}

/// What crosses between devices.
#[derive(Debug, Serialize)]
struct Traffic {
    /// Bytes that a rank receives for one token in one layer, the largest of all layers.
    layer_bytes_per_token: u64,
    /// Bytes that a rank receives for all windows of its replica in all its layers.
    gathered_bytes: u64,
    /// Bytes that a rank hands to the next stage for one token.
    stage_bytes_per_token: u64,
}

/// The largest model that the devices of one replica have room for beside one window.
#[derive(Debug, Serialize)]
struct Largest {
    /// Packed bytes that stay on the devices.
    resident_bytes: u64,
    /// As many weights at this model's bits.
    resident_parameters: u64,
    /// Packed bytes of one layer, where layers pass through.
    layer_bytes: u64,
}

/// A plan of one model in one mode.
pub(crate) struct Subject<'a> {
    pub(crate) model: &'a str,
    pub(crate) acts: &'a str,
    pub(crate) job: &'a Job<'a>,
    pub(crate) why: &'a str,
    pub(crate) plans: &'a Plans,
    pub(crate) windows: &'a [Window],
    /// Names of devices, which seats take in turn.
    pub(crate) devices: &'a [String],
    /// Threads of all seats.
    pub(crate) threads: usize,
    /// Operations a second that one of them does at most, where that is known.
    pub(crate) peaks: Option<&'a Operations>,
    /// Where the bytes that may be taken come from, for people.
    pub(crate) memory: &'a str,
}

impl DryRun {
    pub(crate) fn new(subject: &Subject<'_>) -> DryRun {
        let Subject { model, acts, job, why, plans, windows, devices, threads, peaks, memory } = *subject;
        let (layout, inventory) = (job.layout, job.source.inventory());
        let needs = Needs::of(inventory);
        let seat =
            |index: usize| seat_plan(job, &needs, plans, layout.seat(index), &devices[index % devices.len()]);
        let work = match job.resources.pool {
            Pool::Shared(_) => Some(Floor::of(&Work::of(inventory, job.settings, windows), threads, peaks)),
            Pool::Separate { .. } => None,
        };
        let longest = windows.iter().map(|window| window.ids.len()).max().unwrap_or(0);
        DryRun {
            dry_run_version: 1,
            model: model.to_owned(),
            acts: acts.to_owned(),
            layout: layout.to_string(),
            why: why.to_owned(),
            replicas: layout.replicas,
            pp: layout.stages,
            tp: layout.ranks,
            windows: windows.len(),
            tokens: windows.iter().map(|window| window.ids.len()).sum(),
            packed_bytes: needs.all,
            seats: (0..layout.seats()).map(seat).collect(),
            work,
            threads,
            memory: memory.to_owned(),
            traffic: traffic(&layout, inventory, plans, windows),
            largest: largest(job, &needs, longest),
        }
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut lines = vec![
            format!("model:    {} (acts {}), {} packed", self.model, self.acts, bytes(self.packed_bytes)),
            format!("windows:  {} of {} tokens in all", self.windows, self.tokens),
            format!("layout:   {}: {}", self.layout, self.why),
            format!("memory:   {}", self.memory),
            String::new(),
            self.table().to_string(),
            String::new(),
        ];
        let Traffic { layer_bytes_per_token, gathered_bytes, stage_bytes_per_token } = self.traffic;
        if self.tp > 1 {
            lines.push(format!(
                "traffic:  a rank receives {} a token in each layer, {} in all",
                bytes(layer_bytes_per_token),
                bytes(gathered_bytes)
            ));
        }
        if self.pp > 1 {
            lines.push(format!(
                "          and hands {} a token to the next stage",
                bytes(stage_bytes_per_token)
            ));
        }
        lines.extend(self.work.as_ref().map(Floor::text));
        lines.push(match &self.largest {
            Some(Largest { resident_bytes, resident_parameters, layer_bytes }) => format!(
                "largest:  {} packed would stay on these devices, about {:.1} G weights at this model's bits; larger models pass through, with layers of up to {}",
                bytes(*resident_bytes),
                *resident_parameters as f64 / 1e9,
                bytes(*layer_bytes)
            ),
            None => "largest:  any: weights are read from their files as they are needed".to_owned(),
        });
        lines.join("\n")
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "device", "replica", "stage", "rank", "windows", "groups", "batch", "layers", "rows", "weights",
            "", "takes", "host", "of",
        ]);
        for seat in &self.seats {
            let layers = match seat.layers {
                0 => "none".to_owned(),
                1 => seat.first_layer.to_string(),
                count => format!("{}-{}", seat.first_layer, seat.first_layer + count - 1),
            };
            table.add_row([
                seat.device.clone(),
                seat.replica.to_string(),
                seat.stage.to_string(),
                seat.rank.to_string(),
                seat.windows.to_string(),
                seat.groups.to_string(),
                seat.batch_tokens.to_string(),
                layers,
                seat.rows.clone(),
                bytes(seat.weight_bytes),
                seat.weights.to_owned(),
                bytes(seat.device_bytes),
                bytes(seat.host_bytes),
                bytes(seat.budget_bytes),
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }

    /// Prints it.
    ///
    /// # Errors
    /// Where stdout cannot take it.
    pub(crate) fn print(&self) -> anyhow::Result<()> {
        report::result(&self.text())
    }
}

fn seat_plan(job: &Job<'_>, needs: &Needs, plans: &Plans, seat: Seat, device: &str) -> SeatPlan {
    let replica = &plans.replicas[seat.replica];
    let (plan, layers) = (&replica.stages[seat.stage], &plans.layers[seat.stage]);
    let share = needs.share(layers, job.layout.ranks);
    SeatPlan {
        replica: seat.replica,
        stage: seat.stage,
        rank: seat.rank,
        device: device.to_owned(),
        windows: replica.windows.len(),
        groups: plan.groups.len(),
        batch_tokens: plan.schedule.batch_tokens,
        first_layer: layers.start,
        layers: layers.len(),
        rows: format!("1/{}", job.layout.ranks),
        weight_bytes: share.all,
        weights: match job.resources.pool {
            Pool::Shared(_) => "mapped",
            Pool::Separate { .. } if plan.schedule.resident_layers >= layers.len() => "resident",
            Pool::Separate { .. } => "passing",
        },
        device_bytes: plan.device_bytes,
        host_bytes: plan.host_bytes,
        budget_bytes: match job.resources.pool {
            Pool::Shared(bytes) | Pool::Separate { device: bytes, .. } => bytes,
        },
    }
}

fn traffic(layout: &Layout, inventory: &Inventory, plans: &Plans, windows: &[Window]) -> Traffic {
    let spec = &inventory.spec;
    let of_layer: Vec<u64> = spec.blocks.iter().map(|block| received_in_layer(layout, spec, block)).collect();
    let in_stage = |layers: &std::ops::Range<usize>| of_layer[layers.clone()].iter().sum::<u64>();
    let a_token = plans.layers.iter().map(in_stage).max().unwrap_or(0);
    let tokens = |range: &std::ops::Range<usize>| -> usize {
        windows[range.clone()].iter().map(|window| window.ids.len()).sum()
    };
    let tokens = plans.replicas.iter().map(|replica| tokens(&replica.windows)).max().unwrap_or(0);
    Traffic {
        layer_bytes_per_token: of_layer.iter().copied().max().unwrap_or(0),
        gathered_bytes: a_token * tokens as u64,
        stage_bytes_per_token: handed_on(layout, spec),
    }
}

fn largest(job: &Job<'_>, needs: &Needs, longest: usize) -> Option<Largest> {
    let Pool::Separate { device, .. } = job.resources.pool else { return None };
    let window = longest as u64 * (needs.hidden + needs.activations);
    let room = device.saturating_sub(job.resources.scratch + window);
    let parameters: u64 = job.source.inventory().linears().map(|linear| (linear.n * linear.k) as u64).sum();
    let resident_bytes = room * (job.layout.stages * job.layout.ranks) as u64;
    let per_weight = needs.all as f64 / parameters.max(1) as f64;
    Some(Largest {
        resident_bytes,
        resident_parameters: (resident_bytes as f64 / per_weight.max(f64::MIN_POSITIVE)) as u64,
        layer_bytes: room / 2 * job.layout.ranks as u64,
    })
}

/// Bytes for people, in powers of 1024.
pub(crate) fn bytes(bytes: u64) -> String {
    let (mut amount, mut unit) = (bytes as f64, 0);
    while amount >= 1024.0 && unit < 4 {
        (amount, unit) = (amount / 1024.0, unit + 1);
    }
    let unit = ["B", "KiB", "MiB", "GiB", "TiB"][unit];
    if unit == "B" { format!("{bytes} B") } else { format!("{amount:.1} {unit}") }
}
