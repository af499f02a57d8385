//! `ctq inspect`: what a checkpoint or container holds.

use std::collections::BTreeMap;
use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};
use ctq_model::accounting::{Accounting, Bits};
use ctq_model::inventory::{Inventory, LinearClass};
use ctq_model::quantization::QuantizationConfig;
use ctq_model::spec::FfnSpec;
use ctq_model::{Checkpoint, TensorSource};
use serde::Serialize;

use crate::args::InspectOptions;
use crate::exit::Verdict;
use crate::open::Model;
use crate::report::{self, Report};

/// What is printed as JSON: a stable object.
#[derive(Debug, Serialize)]
struct Inspection {
    inspection_version: u32,
    model: String,
    path: String,
    kind: &'static str,
    family: String,
    layers: usize,
    hidden: usize,
    vocabulary: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    experts: Option<usize>,
    tied_head: bool,
    format: Option<String>,
    schemes: BTreeMap<String, usize>,
    classes: BTreeMap<LinearClass, ClassBits>,
    activations: Vec<String>,
    kv_cache: Option<String>,
    ignored: Vec<String>,
    left_out: Vec<String>,
    bpw: Bpw,
    vram_gb: f64,
    files: Vec<File>,
    operands: &'static str,
    cannot_run: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ClassBits {
    modules: usize,
    weights: u64,
    bpw: f64,
}

#[derive(Debug, Serialize)]
struct Bpw {
    layer: f64,
    head: f64,
    file: f64,
    container: Option<f64>,
}

#[derive(Debug, Serialize)]
struct File {
    name: String,
    bytes: u64,
}

/// What can still be said of a checkpoint that is sound and that ctq cannot run: the fields of an [`Inspection`] that
/// are known.
#[derive(Debug, Serialize)]
struct Refusal {
    inspection_version: u32,
    model: String,
    path: String,
    kind: &'static str,
    family: Option<String>,
    format: Option<String>,
    tensors: usize,
    files: Vec<File>,
    cannot_run: Vec<String>,
}

pub(crate) fn run(options: &InspectOptions, _report: &Report) -> anyhow::Result<Verdict> {
    let model = match Model::open(&options.path, &options.model) {
        Ok(model) => model,
        Err(error) => return refused(options, error),
    };
    let inspection = inspect(&model);
    if options.json {
        report::result(&serde_json::to_string_pretty(&inspection)?)?;
    } else {
        report::result(&text(&inspection))?;
    }
    Ok(Verdict::Good)
}

/// Says what is known of a checkpoint whose files are sound and whose kind ctq does not run; any other error stands.
fn refused(options: &InspectOptions, error: anyhow::Error) -> anyhow::Result<Verdict> {
    use ctq_model::Error as E;
    let kind_not_run = match error.downcast_ref() {
        Some(ctq_convert::Error::Checkpoint(E::Unsupported { .. } | E::Config { .. })) => true,
        Some(_) | None => false,
    };
    let Ok(checkpoint) = Checkpoint::open(&options.path) else { return Err(error) };
    if !kind_not_run {
        return Err(error);
    }
    let config = checkpoint.config();
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let refusal = Refusal {
        inspection_version: 1,
        model: name(&std::path::absolute(&options.path)?),
        path: options.path.display().to_string(),
        kind: "checkpoint",
        family: config.model_type().ok().map(str::to_owned),
        format: match QuantizationConfig::read(config) {
            Ok(Some(config)) => config.format,
            Ok(None) => Some("dense".to_owned()),
            Err(_) => None,
        },
        tensors: checkpoint.names().len(),
        files: checkpoint.files().into_iter().map(|(path, bytes)| File { name: name(path), bytes }).collect(),
        cannot_run: vec![report::chain(&error)],
    };
    if options.json {
        report::result(&serde_json::to_string_pretty(&refusal)?)?;
        return Ok(Verdict::Good);
    }
    let mut lines = vec![
        format!("{} (checkpoint)", refusal.model),
        format!("  family       {}", refusal.family.as_deref().unwrap_or("not stated")),
        format!("  format       {}", refusal.format.as_deref().unwrap_or("not known")),
        format!("  tensors      {}", refusal.tensors),
    ];
    lines.extend(refusal.cannot_run.iter().map(|reason| format!("  cannot run   {reason}")));
    lines.push(String::new());
    lines.extend(refusal.files.iter().map(|file| format!("  {:>14} bytes  {}", file.bytes, file.name)));
    report::result(&lines.join("\n"))?;
    Ok(Verdict::Good)
}

fn inspect(model: &Model) -> Inspection {
    let inventory = model.source().inventory();
    let accounting = model.accounting();
    let spec = &inventory.spec;
    let block = spec.blocks.first();
    let attention = block.map(|block| &block.attention);
    let experts = spec.blocks.iter().find_map(|block| match &block.ffn {
        FfnSpec::Moe { experts, .. } => Some(experts.len()),
        FfnSpec::Gated(_) => None,
    });
    let mut schemes = BTreeMap::new();
    for linear in inventory.linears() {
        *schemes.entry(linear.scheme.to_string()).or_insert(0) += 1;
    }
    Inspection {
        inspection_version: 1,
        model: model.name.clone(),
        path: model.path.display().to_string(),
        kind: if model.is_container() { "container" } else { "checkpoint" },
        family: spec.family.clone(),
        layers: spec.blocks.len(),
        hidden: spec.hidden,
        vocabulary: spec.vocab,
        heads: attention.map_or(0, |a| a.heads),
        kv_heads: attention.map_or(0, |a| a.kv_heads),
        head_dim: attention.map_or(0, |a| a.head_dim),
        experts,
        tied_head: spec.tied(),
        format: inventory.format.clone(),
        schemes,
        classes: classes(inventory, accounting),
        activations: activations(inventory),
        kv_cache: inventory
            .parts()
            .find_map(|(_, part)| part.kv.as_ref())
            .map(|kv| kv.activation.to_string()),
        ignored: inventory.ignored.clone(),
        left_out: inventory.left_out.clone(),
        bpw: Bpw {
            layer: accounting.layer.per_weight(),
            head: accounting.head.per_weight(),
            file: accounting.file.per_weight(),
            container: accounting.container.map(Bits::per_weight),
        },
        vram_gb: accounting.vram_gb(),
        files: model.files().into_iter().map(|(name, bytes)| File { name, bytes }).collect(),
        operands: if inventory.weights_are_bf16() { "bf16" } else { "not all bf16" },
        // What ctq cannot run does not open as a model; see `refused`.
        cannot_run: Vec::new(),
    }
}

fn classes(inventory: &Inventory, accounting: &Accounting) -> BTreeMap<LinearClass, ClassBits> {
    let class = |(class, bits): (&LinearClass, &Bits)| {
        let modules = inventory.linears().filter(|linear| linear.class == *class).count();
        (*class, ClassBits { modules, weights: bits.weights, bpw: bits.per_weight() })
    };
    accounting.classes.iter().map(class).collect()
}

fn activations(inventory: &Inventory) -> Vec<String> {
    let mut found: Vec<String> =
        inventory.linears().filter_map(|linear| linear.scheme.input.map(|input| input.to_string())).collect();
    found.sort();
    found.dedup();
    found
}

fn text(inspection: &Inspection) -> String {
    let mut lines = vec![
        format!("{} ({})", inspection.model, inspection.kind),
        format!(
            "  family       {}: {} layers, hidden {}, {} heads of {} ({} key-value), vocabulary {}{}",
            inspection.family,
            inspection.layers,
            inspection.hidden,
            inspection.heads,
            inspection.head_dim,
            inspection.kv_heads,
            inspection.vocabulary,
            inspection.experts.map(|experts| format!(", {experts} experts")).unwrap_or_default()
        ),
        format!("  format       {}", inspection.format.as_deref().unwrap_or("dense")),
    ];
    for (scheme, modules) in &inspection.schemes {
        lines.push(format!("  scheme       {scheme}: {modules} modules"));
    }
    let or_none = |list: &[String]| if list.is_empty() { "none".to_owned() } else { list.join("; ") };
    lines.push(format!("  activations  {}", or_none(&inspection.activations)));
    lines.push(format!("  kv cache     {}", inspection.kv_cache.as_deref().unwrap_or("not quantized")));
    lines.push(format!("  ignored      {}", shortened(&inspection.ignored)));
    lines.push(format!("  left out     {}", shortened(&inspection.left_out)));
    lines.push(format!(
        "  bpw          layer {:.4}, head {:.4}, file {:.4}{}",
        inspection.bpw.layer,
        inspection.bpw.head,
        inspection.bpw.file,
        inspection.bpw.container.map(|bpw| format!(", container {bpw:.4}")).unwrap_or_default()
    ));
    lines.push(format!("  vram_gb      {:.4}", inspection.vram_gb));
    lines.push(format!("  operands     {}", inspection.operands));
    lines.push(format!("  cannot run   {}", or_none(&inspection.cannot_run)));
    lines.push(String::new());
    lines.push(class_table(inspection));
    lines.push(String::new());
    for file in &inspection.files {
        lines.push(format!("  {:>14} bytes  {}", file.bytes, file.name));
    }
    lines.join("\n")
}

fn class_table(inspection: &Inspection) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["  class", "modules", "weights", "bpw"]);
    for (class, bits) in &inspection.classes {
        let name =
            serde_json::to_value(class).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
        table.add_row([
            format!("  {name}"),
            bits.modules.to_string(),
            bits.weights.to_string(),
            format!("{:.4}", bits.bpw),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// A long list by its beginning and its length.
fn shortened(list: &[String]) -> String {
    match list.len() {
        0 => "none".to_owned(),
        1..=4 => list.join(", "),
        count => format!("{} and {} more", list[..3].join(", "), count - 3),
    }
}
