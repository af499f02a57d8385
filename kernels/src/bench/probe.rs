//! How fast ranks hand one another what a model needs.
//!
//! Every rank runs the same program, whatever has started it and however it reaches the others; what rank 0's clock says
//! counts.

use std::cell::RefCell;
use std::time::Instant;

use super::collective::{
    Carried, Case, CollectiveTiming, Model, bytes_received, ids, partial_bytes, width_of,
};
use super::floor::{Copy, Floor};
use super::{Effort, Weights, noise, random_tiles};
use crate::Compute;
use crate::backend::{Backend, KernelError, Pieces, Treatment, VOCABULARY_TILE};
use crate::collective::{Handover, Pipe, Rank};

/// Bytes of inputs that are laid ready for one round, at most, unless one call takes more.
const READY_BYTES: usize = 256 << 20;

/// Inputs of the linear whose outputs are gathered: few, for only its outputs matter.
const INPUTS: usize = 64;

/// Pipes between ranks 0 and 1, there and back, seen from one of them.
pub struct Ends {
    /// To the other.
    pub outgoing: Box<dyn Pipe>,
    /// From the other.
    pub incoming: Box<dyn Pipe>,
}

impl Ends {
    /// For each of `ranks` threads of one process: ranks 0 and 1 have ends, others none.
    pub fn in_process(ranks: usize) -> Vec<Option<Ends>> {
        let (there, back) = (Handover::default(), Handover::default());
        let ends = |outgoing: &Handover, incoming: &Handover| Ends {
            outgoing: Box::new(outgoing.clone()),
            incoming: Box::new(incoming.clone()),
        };
        let both = [Some(ends(&there, &back)), Some(ends(&back, &there))];
        both.into_iter().chain(std::iter::repeat_with(|| None)).take(ranks).collect()
    }
}

/// Lets nobody wait at a pipe for a rank that has ended before its time.
struct Leave<'a>(Option<&'a Ends>);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if let Some(Ends { outgoing, incoming }) = self.0 {
            [outgoing, incoming].into_iter().for_each(|pipe| pipe.abort("a rank has given up"));
        }
    }
}

/// Seconds of rounds: the middle one, and how far they lie apart.
struct Spread {
    median: f64,
    fastest: f64,
    slowest: f64,
}

/// One of the ranks that measure.
pub struct Probe<'a, B: Backend> {
    /// This rank.
    pub rank: &'a Rank<B>,
    /// Pipes, where this is rank 0 or 1 of several.
    pub ends: Option<&'a Ends>,
    /// How long; the same on all ranks.
    pub effort: Effort,
    /// What times are held against.
    pub floor: Floor,
}

impl<B: Backend> Probe<'_, B> {
    /// Measures one case. All ranks call it, with the same cases in the same order; what rank 0 gets counts.
    ///
    /// # Errors
    /// Where an operation fails or a rank is lost.
    pub fn measure(&self, case: &Case) -> Result<CollectiveTiming, KernelError> {
        let mut leave = Leave(self.ends);
        let bytes = bytes_received(case, self.ranks());
        let (spread, floor) = match case {
            Case::Byte => (self.exchange(vec![vec![1]; self.ranks()])?, None),
            Case::OfModel { carried, model, tokens } => self.of_model(*carried, model, *tokens)?,
        };
        let floor_seconds = floor.map(|floor| self.copy(floor, bytes, case.tokens())).transpose()?;
        leave.0 = None;
        let (operation, what) = case.names();
        Ok(CollectiveTiming {
            operation: operation.to_owned(),
            what: what.to_owned(),
            model: case.model().map(str::to_owned),
            tokens: case.tokens(),
            ranks: self.ranks(),
            bytes,
            seconds: spread.median,
            fastest_seconds: spread.fastest,
            slowest_seconds: spread.slowest,
            floor_seconds,
        })
    }

    fn ranks(&self) -> usize {
        self.rank.peers().ranks()
    }

    /// What a model needs, and the floor for it.
    fn of_model(
        &self,
        carried: Carried,
        model: &Model,
        tokens: usize,
    ) -> Result<(Spread, Option<Floor>), KernelError> {
        Ok(match carried {
            Carried::Columns(columns) => {
                (self.all_gather(width_of(columns, model), tokens)?, Some(self.floor))
            }
            Carried::LogSumExps => {
                let own = self.rank.peers().rank();
                let part = |to| vec![0x3f; partial_bytes(model, tokens, self.ranks(), own, to)];
                (self.exchange((0..self.ranks()).map(part).collect())?, Some(Floor::Host))
            }
            Carried::Embeddings => (self.embed(model.hidden, tokens)?, Some(Floor::Host)),
            Carried::HandOver => (self.hand_over(model.hidden, tokens)?, Some(Floor::Host)),
        })
    }

    /// Gathers columns that a linear has left with its ranks.
    fn all_gather(&self, (width, pieces): (usize, Pieces), tokens: usize) -> Result<Spread, KernelError> {
        let rank = self.rank;
        let weight = rank.matrix(&random_tiles(&Weights::Bf16.linear(width, INPUTS), 2), 0..width, pieces)?;
        let x = rank.upload(INPUTS, &noise(tokens * INPUTS))?;
        let window = 0..tokens;
        let windows = std::slice::from_ref(&window);
        let operand = rank.prepare(&x, &Treatment::Plain, Compute::Bf16, windows)?;
        let columns = rank.linear(&operand, &weight, None, Compute::Bf16)?;
        let rows: Vec<u32> = (0..tokens as u32).collect();
        // No rows to add: the operation gathers what it adds to, and does nothing else.
        let nothing = rank.upload(width, &[])?;
        self.rounds(
            tokens * width * size_of::<f32>() / self.ranks(),
            || rank.gather(&columns, &rows),
            |mut part| rank.scatter_add(&mut part, &nothing, &[], &[]),
        )
    }

    /// Hands `parts` to the other ranks.
    fn exchange(&self, parts: Vec<Vec<u8>>) -> Result<Spread, KernelError> {
        let peers = self.rank.peers();
        let bytes = parts.iter().map(Vec::len).sum();
        self.rounds(bytes, || Ok(parts.clone()), |parts| peers.exchange(parts).map(drop))
    }

    /// Looks embeddings up in a table of which each rank holds as many rows.
    fn embed(&self, width: usize, tokens: usize) -> Result<Spread, KernelError> {
        let rows = self.ranks() * VOCABULARY_TILE;
        let table = self.rank.matrix(
            &random_tiles(&Weights::Bf16.linear(rows, width), 2),
            0..rows,
            Pieces::VocabularyTiles,
        )?;
        let ids = ids(tokens, rows);
        self.rounds(0, || Ok(()), |()| self.rank.embed(&table, &ids).map(drop))
    }

    /// Hidden states from rank 0 to rank 1 and back, halved.
    fn hand_over(&self, width: usize, tokens: usize) -> Result<Spread, KernelError> {
        let rank = self.rank;
        let hidden = rank.upload(width, &noise(tokens * width))?;
        let there_and_back = self.rounds(
            0,
            || Ok(()),
            |()| match (self.ends, rank.peers().rank()) {
                (Some(ends), 0) => {
                    ends.outgoing.send(rank.download(&hidden)?)?;
                    rank.upload(width, &ends.incoming.receive()?).map(drop)
                }
                (Some(ends), _) => {
                    let hidden = rank.upload(width, &ends.incoming.receive()?)?;
                    ends.outgoing.send(rank.download(&hidden)?)
                }
                (None, _) => Ok(()),
            },
        )?;
        let Spread { median, fastest, slowest } = there_and_back;
        Ok(Spread { median: median / 2.0, fastest: fastest / 2.0, slowest: slowest / 2.0 })
    }

    /// Copies as many bytes, every rank by itself and all at a time: median seconds.
    fn copy(&self, floor: Floor, bytes: usize, rows: usize) -> Result<f64, KernelError> {
        let copy = RefCell::new(Copy::of(floor, self.rank, bytes, rows)?);
        Ok(self.rounds(0, || Ok(()), |()| copy.borrow_mut().make())?.median)
    }

    /// Times `run` on inputs that `prepare` has laid ready, of about `bytes` bytes each, until all ranks have done it.
    fn rounds<T>(
        &self,
        bytes: usize,
        prepare: impl Fn() -> Result<T, KernelError>,
        run: impl Fn(T) -> Result<(), KernelError>,
    ) -> Result<Spread, KernelError> {
        let marker = self.rank.upload(1, &[0.0])?;
        let round = |calls: usize| {
            let inputs = (0..calls).map(|_| prepare()).collect::<Result<Vec<T>, _>>()?;
            self.rank.download(&marker)?;
            self.tell(0)?;
            let start = Instant::now();
            inputs.into_iter().try_for_each(&run)?;
            self.rank.download(&marker)?;
            self.tell(0)?;
            Ok::<f64, KernelError>(start.elapsed().as_secs_f64() / calls as f64)
        };
        // The first call takes memory and compiles kernels.
        round(1)?;
        let wanted = (self.effort.seconds / round(1)?).ceil().clamp(1.0, 1000.0) as usize;
        let ready = READY_BYTES.checked_div(bytes).unwrap_or(usize::MAX).max(1);
        let calls = self.tell(wanted.min(ready) as u64)? as usize;
        let mut rounds: Vec<f64> =
            (0..self.effort.rounds.max(1)).map(|_| round(calls)).collect::<Result<_, _>>()?;
        rounds.sort_by(f64::total_cmp);
        let (fastest, slowest) = (rounds[0], rounds[rounds.len() - 1]);
        Ok(Spread { median: rounds[rounds.len() / 2], fastest, slowest })
    }

    /// What rank 0 says, when all ranks are here.
    fn tell(&self, number: u64) -> Result<u64, KernelError> {
        let peers = self.rank.peers();
        let told = peers.exchange(vec![number.to_le_bytes().to_vec(); peers.ranks()])?;
        let lost = || KernelError::Lost {
            what: "rank 0 said nothing: start all ranks with the same command".to_owned(),
        };
        let bytes = told.first().and_then(|bytes| bytes.as_slice().try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or_else(lost)
    }
}
