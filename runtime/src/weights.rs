//! One part of the model on a backend: matrices handed over packed, vectors as f32. Looks names up; runs nothing.

use std::collections::BTreeMap;

use ctq_container::{PartTiles, RawVector};
use ctq_kernels::{Backend, Pieces, Quantizer, Treatment};
use ctq_model::inventory::{Linear, LinearClass, PartInventory};
use ctq_model::scheme::ActivationScale;
use ctq_model::spec::{AttentionSpec, BlockSpec, FfnSpec, GatedSpec};

use crate::error::{Error, Result};
use crate::treatment::{self, Acts, KvQuantizers, floats};

/// A linear ready to run.
pub(crate) struct LinearWeights<B: Backend> {
    pub(crate) module: String,
    pub(crate) matrix: B::Matrix,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) input: Treatment,
    pub(crate) output: Option<Quantizer>,
}

/// A decoder block ready to run.
pub(crate) struct BlockWeights<B: Backend> {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) q: LinearWeights<B>,
    pub(crate) k: LinearWeights<B>,
    pub(crate) v: LinearWeights<B>,
    pub(crate) o: LinearWeights<B>,
    pub(crate) qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    pub(crate) kv: Option<KvQuantizers>,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) ffn: FfnWeights<B>,
}

/// A feed-forward part ready to run.
pub(crate) enum FfnWeights<B: Backend> {
    Gated(Box<GatedWeights<B>>),
    Moe { router: LinearWeights<B>, experts: Vec<GatedWeights<B>> },
}

/// A gated projection ready to run.
pub(crate) struct GatedWeights<B: Backend> {
    pub(crate) gate: LinearWeights<B>,
    pub(crate) up: LinearWeights<B>,
    pub(crate) down: LinearWeights<B>,
}

/// Takes matrices and vectors out of a part by name.
pub(crate) struct Loader<'a, B> {
    backend: &'a B,
    acts: Acts,
    linears: BTreeMap<&'a str, &'a Linear>,
    tiles: &'a PartTiles,
    kv: Option<&'a ctq_model::inventory::KvScheme>,
}

impl<'a, B: Backend> Loader<'a, B> {
    pub(crate) fn new(
        backend: &'a B,
        acts: Acts,
        part: &'a PartInventory,
        tiles: &'a PartTiles,
    ) -> Loader<'a, B> {
        let linears = part.linears.iter().map(|linear| (linear.module.as_str(), linear)).collect();
        Loader { backend, acts, linears, tiles, kv: part.kv.as_ref() }
    }

    fn vectors(&self) -> &'a BTreeMap<String, RawVector> {
        &self.tiles.vectors
    }

    /// A norm's weight.
    pub(crate) fn norm(&self, module: &str) -> Vec<f32> {
        floats(&self.vectors()[&format!("{module}.weight")])
    }

    pub(crate) fn linear(&self, module: &str) -> Result<LinearWeights<B>> {
        self.linear_in(
            module,
            match self.linears[module].class {
                LinearClass::Embedding | LinearClass::Head => Pieces::VocabularyTiles,
                LinearClass::Attention | LinearClass::Ffn | LinearClass::Expert | LinearClass::Router => {
                    Pieces::Atoms
                }
            },
        )
    }

    fn linear_in(&self, module: &str, pieces: Pieces) -> Result<LinearWeights<B>> {
        let linear = self.linears[module];
        let matrix = self
            .backend
            .matrix(&self.tiles.matrices[module], 0..linear.n, pieces)
            .map_err(|source| Error::Kernel { module: module.to_owned(), source })?;
        Ok(LinearWeights {
            module: module.to_owned(),
            matrix,
            bias: self.vectors().get(&format!("{module}.bias")).map(floats),
            input: treatment::input(linear, self.acts, self.vectors()),
            output: treatment::output(linear, self.acts, self.vectors()),
        })
    }

    fn gated(&self, gated: &GatedSpec) -> Result<GatedWeights<B>> {
        Ok(GatedWeights {
            gate: self.linear(&gated.gate)?,
            up: self.linear(&gated.up)?,
            down: self.linear(&gated.down)?,
        })
    }

    /// Whether nothing before attention looks beyond one head, so that ranks may hold whole heads and gather none.
    fn heads_stand_alone(
        &self,
        attention: &AttentionSpec,
        qk_norm: Option<&(Vec<f32>, Vec<f32>)>,
        kv: Option<&KvQuantizers>,
    ) -> bool {
        let stored = |quantizer: &Quantizer| quantizer.activation.scale == ActivationScale::Static;
        let quantized_output =
            |module: &str| self.acts != Acts::Off && self.linears[module].scheme.output.is_some();
        attention.head_dim.is_multiple_of(Pieces::Atoms.rows())
            && qk_norm.is_none_or(|(q, k)| q.len() == attention.head_dim && k.len() == attention.head_dim)
            && kv.is_none_or(|kv| stored(&kv.k) && stored(&kv.v) && kv.q.as_ref().is_none_or(stored))
            && ![&attention.q, &attention.k, &attention.v].into_iter().any(|module| quantized_output(module))
    }

    pub(crate) fn block(&self, block: &BlockSpec) -> Result<BlockWeights<B>> {
        let attention = &block.attention;
        let kv = match self.acts {
            Acts::Off => None,
            Acts::Library | Acts::Kernel => self.kv.map(|scheme| treatment::kv(scheme, self.vectors())),
        };
        let qk_norm = attention.qk_norm.as_ref().map(|(q, k)| (self.norm(q), self.norm(k)));
        let (queries, keys) = if self.heads_stand_alone(attention, qk_norm.as_ref(), kv.as_ref()) {
            let (head_dim, group) = (attention.head_dim, attention.heads / attention.kv_heads);
            (Pieces::Heads { head_dim }, Pieces::KvHeads { head_dim, group })
        } else {
            (Pieces::Atoms, Pieces::Atoms)
        };
        Ok(BlockWeights {
            attention_norm: self.norm(&block.attention_norm),
            q: self.linear_in(&attention.q, queries)?,
            k: self.linear_in(&attention.k, keys)?,
            v: self.linear_in(&attention.v, keys)?,
            o: self.linear(&attention.o)?,
            qk_norm,
            kv,
            ffn_norm: self.norm(&block.ffn_norm),
            ffn: match &block.ffn {
                FfnSpec::Gated(gated) => FfnWeights::Gated(Box::new(self.gated(gated)?)),
                FfnSpec::Moe { router, experts, .. } => FfnWeights::Moe {
                    router: self.linear(router)?,
                    experts: experts.iter().map(|expert| self.gated(expert)).collect::<Result<_>>()?,
                },
            },
        })
    }
}
