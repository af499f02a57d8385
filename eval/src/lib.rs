//! From text to one trustworthy number: data sets, protocols, statistics, records.
//!
//! A perplexity is the answer to a question, and most disagreements between tools are different questions.
//! This crate owns the question and the bookkeeping of the answer; the forward pass in between belongs to
//! someone else.
//!
//! ```text
//! file          text::Text::load            which bytes, and which data set they are
//!   | rows      text::Text                  the same rows from every encoding of one data set
//!   v
//! one string    text::Text::joined          the join rule of the protocol
//!   |
//!   v
//! token stream  tokens::Tokenizer::stream   BOS rule, special tokens, sha256 of the ids
//!   |
//!   v
//! windows       protocol::Protocol::windows ids to feed, positions to score, protocol id
//!   |
//!   |           (a model scores each window: ctq_model::window::WindowScores)
//!   v
//! scores        partial                     what an interrupted evaluation has already earned
//!   |           nll_file                    every negative log-likelihood, for later comparison
//!   |           shard, part                 windows shared out among independent runs, and their scores joined
//!   v
//! numbers       statistics                  perplexity, its standard errors, paired differences
//!   |
//!   v
//! record        record                      the number beside its question and its method; JSON, text, table
//! ```
//!
//! Knows nothing of models, weights, schemes, devices or how a score comes about: it hands out
//! [`Window`](ctq_model::window::Window)s and takes back [`WindowScores`](ctq_model::window::WindowScores).

mod atomic;
mod digest;
mod error;

pub mod nll_file;
pub mod part;
pub mod partial;
pub mod protocol;
pub mod record;
pub mod shard;
pub mod statistics;
pub mod text;
pub mod tokens;

pub use error::{Error, Result};
