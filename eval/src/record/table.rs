//! Several records as one table, which is Markdown at the same time.
//!
//! Knows columns; refuses to compute and to sort: rows stay in the caller's order.

use std::collections::BTreeSet;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

use super::{Record, Status, numbers, render};

const COLUMNS: [&str; 9] = ["model", "scheme", "bpw", "GiB", "acts", "compute", "perplexity", "±", "note"];

/// Columns of numbers, aligned to the right.
const NUMBERS: [usize; 4] = [2, 3, 6, 7];

/// One row a record. A row without an answer says why in its note; a row with a paired difference says it
/// there. Records of unequal protocols say their protocol there too: their numbers do not compare.
pub fn table(records: &[Record]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(COLUMNS);
    let questions: BTreeSet<&String> =
        records.iter().filter_map(|record| record.protocol_id.as_ref()).collect();
    for record in records {
        let protocol = (questions.len() > 1).then(|| render::protocol(record));
        table.add_row(row(record, protocol));
    }
    for column in NUMBERS {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("{table}\n")
}

fn row(record: &Record, protocol: Option<String>) -> Vec<Cell> {
    let reason = record.reason.as_deref().unwrap_or("no reason was recorded");
    let answer = match record.status {
        Status::Ok => None,
        Status::Partial => Some("one part of several".to_owned()),
        Status::Failed => Some(format!("failed: {reason}")),
        Status::Invalid => Some(format!("INVALID: {reason}")),
    };
    let paired = record.paired.as_ref().map(render::difference);
    let notes: Vec<String> = [answer, paired, protocol].into_iter().flatten().collect();
    let shown = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    [
        record.model.clone(),
        shown(record.scheme.clone()),
        shown(record.bpw.map(|bpw| numbers::bpw(bpw.layer))),
        shown(record.vram_gb.map(numbers::significant)),
        shown(record.acts.clone()),
        shown(record.compute.clone()),
        shown(record.perplexity.map(numbers::perplexity)),
        shown(record.perplexity_error.map(numbers::significant)),
        notes.join("; ").replace('\n', " ").replace('|', "/"),
    ]
    .into_iter()
    .map(Cell::new)
    .collect()
}
