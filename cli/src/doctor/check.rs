//! `ctq doctor --check`: every operation of a GPU held against the CPU, on random data.

use std::fs;

use anyhow::{Context, bail};
use comfy_table::{CellAlignment, Table, presets};
use ctq_kernels::check::{Area, Bound, Extent, Finding, Observation, Size, compare, observe_library};
use ctq_kernels::cpu::Cpu;
use serde::Serialize;

use super::collectives;
use crate::args::{CheckSize, DeviceChoice, DoctorOptions};
use crate::device::{Opened, Wanted};
use crate::eval;
use crate::exit::Verdict;
use crate::report::{self, Report};

/// What is written as JSON: a stable object.
#[derive(Debug, Serialize)]
struct Findings<'a> {
    findings_version: u32,
    device: String,
    findings: Vec<Case<'a>>,
    observations: Vec<Seen<'a>>,
}

#[derive(Debug, Serialize)]
struct Case<'a> {
    operation: &'a str,
    case: &'a str,
    /// Relative error allowed; 0: every bit must be equal.
    bound: f64,
    /// Relative error; none where it is not finite.
    error: Option<f64>,
    failure: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct Seen<'a> {
    name: &'a str,
    detail: &'a str,
}

pub(super) fn run(size: CheckSize, options: &DoctorOptions, report: &Report) -> anyhow::Result<Verdict> {
    if options.device == DeviceChoice::Cpu {
        bail!("cpu is what a GPU is held against: name the GPU to check, as in --device cuda");
    }
    if let Some(path) = &options.findings {
        eval::check_writable(path)?;
    }
    let opened = Opened::open_several(options.device, Wanted::All, None, report)?;
    let Opened::Cuda(gpus) = &opened else {
        bail!("there is no GPU to check: the CPU is what a GPU is held against; `ctq doctor` tells more");
    };
    let cuda = &gpus.devices[0];
    let identity = opened.identity();
    let device = format!("{} {}", identity.name, identity.isa);
    report.note(&format!("{device}: every operation against the CPU"));
    let (size, observations) = match size {
        CheckSize::Small => (Size::Small, Vec::new()),
        CheckSize::Large => (Size::Large, observe_library(cuda)?),
    };
    let mut findings = compare(cuda, &Cpu::detect(), Area::ALL, size, Extent::Everything);
    findings.extend(collectives::check(gpus));
    if let Some(path) = &options.findings {
        let json = serde_json::to_string_pretty(&record(&device, &findings, &observations))?;
        fs::write(path, json + "\n").with_context(|| {
            format!("{}: cannot be written; check that its folder is there", path.display())
        })?;
    }
    report::result(&text(&findings, &observations))?;
    let sound = findings.iter().all(|finding| finding.failure.is_none());
    Ok(if sound { Verdict::Good } else { Verdict::Failed })
}

fn record<'a>(device: &str, findings: &'a [Finding], observations: &'a [Observation]) -> Findings<'a> {
    let case = |finding: &'a Finding| Case {
        operation: finding.operation,
        case: &finding.case,
        bound: match finding.bound {
            Bound::Bits => 0.0,
            Bound::Relative(bound) => bound,
        },
        error: finding.error.is_finite().then_some(finding.error),
        failure: finding.failure.as_deref(),
    };
    Findings {
        findings_version: 1,
        device: device.to_owned(),
        findings: findings.iter().map(case).collect(),
        observations: observations
            .iter()
            .map(|seen| Seen { name: &seen.name, detail: &seen.detail })
            .collect(),
    }
}

/// Each operation once, in the order in which they come first.
fn operations(findings: &[Finding]) -> Vec<&'static str> {
    let mut operations = Vec::new();
    for finding in findings {
        if !operations.contains(&finding.operation) {
            operations.push(finding.operation);
        }
    }
    operations
}

/// A line for each operation, then whatever is wrong, then the verdict.
fn text(findings: &[Finding], observations: &[Observation]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["operation", "cases", "largest error", "wrong"]);
    for operation in operations(findings) {
        let of: Vec<&Finding> = findings.iter().filter(|finding| finding.operation == operation).collect();
        let largest = of.iter().map(|finding| finding.error).fold(0.0, f64::max);
        let wrong = of.iter().filter(|finding| finding.failure.is_some()).count();
        let error = if largest == 0.0 { "none".to_owned() } else { format!("{largest:.1e}") };
        table.add_row([operation.to_owned(), of.len().to_string(), error, wrong.to_string()]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut lines = vec![table.to_string()];
    lines.extend(observations.iter().map(|seen| format!("{}: {}", seen.name, seen.detail)));
    let wrong: Vec<&Finding> = findings.iter().filter(|finding| finding.failure.is_some()).collect();
    lines.extend(wrong.iter().take(10).map(|finding| {
        format!("{} {}: {}", finding.operation, finding.case, finding.failure.as_deref().unwrap_or_default())
    }));
    lines.push(format!("verdict: {}", if wrong.is_empty() { "PASSED" } else { "FAILED" }));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(operation: &'static str, error: f64, failure: Option<&str>) -> Finding {
        let failure = failure.map(str::to_owned);
        Finding { operation, case: "a case".to_owned(), bound: Bound::Bits, error, failure }
    }

    #[test]
    fn each_operation_has_one_line_whatever_the_order_of_its_cases() {
        let findings = [
            finding("weights", 0.0, None),
            finding("linear", 0.0, None),
            finding("weights", 0.0, None),
            finding("linear", f64::INFINITY, Some("it failed")),
        ];
        let text = text(&findings, &[]);
        let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[1..3], [vec!["weights", "2", "none", "0"], vec!["linear", "2", "inf", "1"]]);
        assert!(text.ends_with("linear a case: it failed\nverdict: FAILED"), "{text}");
    }
}
