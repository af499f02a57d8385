//! The `ctq` program as people meet it: run as a process, judged by its output, its files and its exit code.
//!
//! Each test works in a folder of its own, with a cache of its own.

mod bench;
mod checkpoint;
mod commands;
mod data;
mod exit_codes;
mod hostile_files;
mod hostile_models;
mod hostile_outputs;
mod interrupts;
mod namespaces;
mod processes;
mod resume;
mod session;
mod shards;
mod transcripts;
mod values;
