//! This crate against the outside world: real data, other people's hashes and counts, worked examples.

mod assets;
mod nll_file;
mod oracle;
mod part;
mod partial;
mod protocol;
mod record;
mod statistics;
mod text;
mod tokens;
