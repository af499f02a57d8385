//! The `ctq` binary: arguments, progress, tables, exit codes. No logic worth testing elsewhere.

mod args;
mod bench;
mod cache;
mod convert;
mod demo;
mod device;
mod doctor;
mod dry_run;
mod eval;
mod evaluate;
mod exit;
mod floor;
mod inspect;
mod interrupt;
mod logits;
mod machine;
mod merge;
mod open;
mod part;
mod party;
mod post;
mod progress;
mod question;
mod report;
mod restore;
mod resume;
mod score;
mod seats;
mod verify;
mod watch;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Arguments, Command};
use crate::report::Report;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let report = match Report::new(&arguments.output) {
        Ok(report) => report,
        Err(error) => return exit::failure(&error),
    };
    interrupt::install();
    let outcome = match &arguments.command {
        Command::Convert(options) => convert::run(options, &report),
        Command::Restore(options) => restore::run(options, &report),
        Command::Inspect(options) => inspect::run(options, &report),
        Command::Eval(options) => eval::run(options, &report),
        Command::Merge(options) => merge::run(options, &report),
        Command::Verify(options) => verify::run(options, &report),
        Command::Logits(options) => logits::run(options, &report),
        Command::Demo(options) => demo::run(options, &report),
        Command::Doctor(options) => doctor::run(options, &report),
        Command::Bench(options) => bench::run(options, &report),
    };
    match outcome {
        Ok(verdict) => verdict.into(),
        Err(error) => {
            report.failure(&error);
            exit::code_of(&error)
        }
    }
}
