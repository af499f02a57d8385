//! A record as a block of plain text, and as one line to paste elsewhere.
//!
//! Knows words and their order; refuses to compute. What a record does not know is left out.

use super::{PairedRecord, Record, Status, numbers};

/// The whole result, one fact a line, with a newline at the end.
pub fn block(record: &Record) -> String {
    let lines = [
        Some(format!("{}{}", label("model"), model(record))),
        Some(format!("{}{}", label("perplexity"), answer(record))),
        record.total_nll.map(|nll| format!("{}{nll:.6} nats", label("total nll"))),
        record.count.map(|count| format!("{}{count} positions", label("count"))),
        scored(record),
        Some(format!("{}{}", label("protocol"), protocol(record))),
        text(record),
        method(record),
        record.paired.as_ref().map(|paired| format!("{}{}", label("difference"), difference(paired))),
        bpw(record),
        cost(record),
        record
            .peak_memory_bytes
            .map(|peak| format!("{}{} (this run)", label("peak memory"), numbers::bytes(peak))),
    ];
    lines.into_iter().flatten().map(|line| line + "\n").collect()
}

/// One short line: number, model, question, method, program.
pub fn line(record: &Record) -> String {
    let number = match (record.status, record.perplexity) {
        (Status::Ok, Some(perplexity)) => {
            let error = record.perplexity_error.map(|error| format!(" ± {}", numbers::significant(error)));
            format!("ppl {}{}", numbers::perplexity(perplexity), error.unwrap_or_default())
        }
        (Status::Ok | Status::Failed | Status::Invalid | Status::Partial, _) => {
            format!("ppl {}", answer(record))
        }
    };
    let scheme = record.scheme.as_ref().map(|scheme| format!(" {scheme}")).unwrap_or_default();
    let bpw = record.bpw.map(|bpw| format!(" {} bpw", numbers::bpw(bpw.layer))).unwrap_or_default();
    let acts = record.acts.as_ref().map(|acts| format!("acts {acts}"));
    let how = [acts, record.compute.clone()].into_iter().flatten().collect::<Vec<_>>().join(", ");
    let ids = [("protocol", &record.protocol_id), ("method", &record.method_id)];
    let ids = ids.iter().filter_map(|(name, id)| id.as_ref().map(|id| format!("{name} {id}")));
    let parts = [
        number,
        format!("{}{scheme}{bpw}", record.model),
        format!("{}{}", record.preset, shape(record)),
        how,
        ids.collect::<Vec<_>>().join(" "),
        format!("ctq {}", record.ctq_version),
    ];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" | ")
}

/// The perplexity with its error, or what there is instead of one.
fn answer(record: &Record) -> String {
    let reason = record.reason.as_deref().unwrap_or("no reason was recorded");
    match (record.status, record.perplexity) {
        (Status::Ok, Some(perplexity)) => {
            let block = record.perplexity_error.map_or_else(
                || " (one block of text: no error)".to_owned(),
                |error| format!(" ± {}", numbers::significant(error)),
            );
            let iid =
                record.perplexity_error_iid.map(|error| format!(" (iid ± {})", numbers::significant(error)));
            format!("{}{block}{}", numbers::perplexity(perplexity), iid.unwrap_or_default())
        }
        (Status::Ok, None) => "none was recorded".to_owned(),
        (Status::Partial, _) => "none yet: one part of several".to_owned(),
        (Status::Failed, _) => format!("none, failed: {reason}"),
        (Status::Invalid, _) => format!("none, INVALID: {reason}"),
    }
}

/// A paired difference as a change of perplexity in percent.
pub(super) fn difference(paired: &PairedRecord) -> String {
    format!("{} against acts {}", numbers::change(paired.ratio, paired.ratio_error), paired.against)
}

fn label(name: &str) -> String {
    format!("{:<13}", format!("{name}:"))
}

fn model(record: &Record) -> String {
    let kind = [&record.family, &record.scheme].into_iter().flatten().cloned().collect::<Vec<_>>().join(", ");
    if kind.is_empty() { record.model.clone() } else { format!("{} ({kind})", record.model) }
}

/// ` 2048/512x20`: window length, stride, windows.
fn shape(record: &Record) -> String {
    match (record.ctx, record.stride, record.windows) {
        (Some(ctx), Some(stride), Some(windows)) => format!(" {ctx}/{stride}x{windows}"),
        (None, _, _) | (_, None, _) | (_, _, None) => String::new(),
    }
}

fn scored(record: &Record) -> Option<String> {
    let scored = record.scored.as_ref()?;
    let (first, last, of) = (scored.first, scored.last, scored.of);
    Some(format!("{}tokens {first}-{last} of {of} ({:.1} %)", label("scored"), scored.percent))
}

pub(super) fn protocol(record: &Record) -> String {
    let id = record.protocol_id.as_ref().map(|id| format!(", id {id}")).unwrap_or_default();
    format!("{}{}{id}", record.preset, shape(record))
}

fn text(record: &Record) -> Option<String> {
    let text = record.text.as_ref()?;
    let name = text.recognised.as_ref().unwrap_or(&text.file);
    let tokens = record
        .tokens_sha256
        .as_deref()
        .map(|hash| format!(", ids sha256 {}", hash.get(..16).unwrap_or(hash)));
    Some(format!(
        "{}{name} ({}, {} {}), join {}, bos {}{}",
        label("text"),
        text.form,
        text.rows,
        if text.rows == 1 { "row" } else { "rows" },
        text.join,
        text.bos,
        tokens.unwrap_or_default()
    ))
}

fn method(record: &Record) -> Option<String> {
    let named = |name: &str, value: &Option<String>| value.as_ref().map(|value| format!("{name} {value}"));
    let backend = [&record.backend, &record.isa].into_iter().flatten().cloned().collect::<Vec<_>>().join(" ");
    let parts = [
        named("acts", &record.acts),
        named("compute", &record.compute),
        named("kv", &record.kv),
        Some(backend).filter(|backend| !backend.is_empty()),
        named("id", &record.method_id),
    ];
    let known: Vec<String> = parts.into_iter().flatten().collect();
    (!known.is_empty()).then(|| format!("{}{}", label("method"), known.join(", ")))
}

fn bpw(record: &Record) -> Option<String> {
    let bpw = record.bpw?;
    let container =
        bpw.container.map(|container| format!(", container {}", numbers::bpw(container))).unwrap_or_default();
    let vram = record
        .vram_gb
        .map(|vram| format!("; layers and head {} GiB", numbers::significant(vram)))
        .unwrap_or_default();
    Some(format!(
        "{}layers {}, head {}, file {}{container}{vram}",
        label("bpw"),
        numbers::bpw(bpw.layer),
        numbers::bpw(bpw.head),
        numbers::bpw(bpw.file)
    ))
}

fn cost(record: &Record) -> Option<String> {
    let seconds = record.seconds?;
    let rate = record.tokens_per_second.map(|rate| format!(", {rate:.1} tokens/s")).unwrap_or_default();
    let threads = record.threads.map(|threads| format!(", {threads} threads")).unwrap_or_default();
    let of_several = |count: &Option<u64>| count.filter(|count| *count > 1);
    let shared =
        [("tp", record.tp), ("pp", of_several(&record.pp)), ("replicas", of_several(&record.replicas))];
    let shared: String =
        shared.iter().filter_map(|(what, count)| Some(format!(", {what} {}", (*count)?))).collect();
    Some(format!("{}{}{rate}{threads}{shared}", label("time"), numbers::seconds(seconds)))
}
