//! Everything a checkpoint's text model consists of: each linear with its shape and scheme, each vector, each
//! attention module's key-value scheme, part by part; and the tensors that text scoring leaves out.
//!
//! The one place where specification, configuration and tensors are held against one another.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::matching::{Matcher, ModuleClass};
use crate::quantization::QuantizationConfig;
use crate::resolve;
use crate::scheme::{Activation, ActivationScale, ActivationSharing, Scheme};
use crate::spec::{AttentionSpec, BlockSpec, FfnSpec, GatedSpec};
use crate::{DType, Error, Result, Spec, TensorSource};

/// The modules of a text model, by part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// The model as data.
    pub spec: Spec,
    embedding: PartInventory,
    layers: Vec<PartInventory>,
    head: PartInventory,
    /// Tensors that scoring text does not use, sorted.
    pub left_out: Vec<String>,
    /// The configuration's own name for its format, `None` for a dense checkpoint.
    pub format: Option<String>,
    /// Modules on the ignore list that exist, sorted.
    pub ignored: Vec<String>,
}

/// The unit of streaming, of resuming and of hashing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// The embedding table.
    Embedding,
    /// One decoder block.
    Layer(usize),
    /// The final norm, and the head where it is not tied.
    Head,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Embedding => f.write_str("embedding"),
            Part::Layer(index) => write!(f, "layer {index}"),
            Part::Head => f.write_str("head"),
        }
    }
}

/// What one part consists of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PartInventory {
    /// Matrices.
    pub linears: Vec<Linear>,
    /// Norm weights: dense vectors.
    pub vectors: Vec<Vector>,
    /// Quantization of keys, values and queries.
    pub kv: Option<KvScheme>,
    /// Every original tensor of this part, in a fixed order.
    pub tensors: Vec<String>,
}

/// A matrix of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Linear {
    /// Module name in the checkpoint.
    pub module: String,
    /// Output rows.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// What it is for, which decides how its bits are counted.
    pub class: LinearClass,
    /// Storage and activation quantization.
    pub scheme: Scheme,
    /// Whether a bias is stored.
    pub bias: bool,
}

/// What a matrix is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinearClass {
    /// Token embedding.
    Embedding,
    /// q, k, v and o.
    Attention,
    /// Projections of a dense feed-forward part.
    Ffn,
    /// Projections of an expert.
    Expert,
    /// Router of a mixture of experts.
    Router,
    /// Output head.
    Head,
}

/// A vector of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vector {
    /// Tensor name.
    pub tensor: String,
    /// Elements.
    pub length: usize,
}

/// Quantization of keys and values (and queries) after rotation, before attention.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvScheme {
    /// How.
    pub activation: Activation,
    /// Tensor with the scale of keys, one for all or one a head; `None` where scales are dynamic.
    pub k_scale: Option<String>,
    /// Tensor with the scale of values.
    pub v_scale: Option<String>,
    /// Tensor with the scale of queries, where they are quantized too.
    pub q_scale: Option<String>,
    /// Whether queries are quantized.
    pub queries: bool,
}

impl Inventory {
    /// Reads the text model of a checkpoint.
    ///
    /// `accepted_keys`: see [`Spec::read`].
    ///
    /// # Errors
    /// Names the key or tensor that is missing, contradictory or not supported.
    pub fn read(source: &dyn TensorSource, accepted_keys: &[String]) -> Result<Inventory> {
        let spec = Spec::read(source, accepted_keys)?;
        let config = QuantizationConfig::read(source.config())?;
        let matcher = match &config {
            Some(config) => Some(Matcher::new(source.config().path(), config)?),
            None => None,
        };
        let mut builder = Builder {
            source,
            spec: &spec,
            config: config.as_ref(),
            matcher,
            used: BTreeSet::new(),
            ignored: BTreeSet::new(),
        };
        let embedding = builder.embedding()?;
        let layers = spec.blocks.iter().map(|block| builder.layer(block)).collect::<Result<_>>()?;
        let head = builder.head()?;
        let left_out = source
            .names()
            .into_iter()
            .filter(|name| !builder.used.contains(*name))
            .map(str::to_owned)
            .collect();
        let ignored = builder.ignored.into_iter().collect();
        let format = config.and_then(|config| config.format);
        Ok(Inventory { spec, embedding, layers, head, left_out, format, ignored })
    }

    /// All parts in the order in which a forward pass uses them.
    pub fn parts(&self) -> impl Iterator<Item = (Part, &PartInventory)> {
        let layers = self.layers.iter().enumerate().map(|(index, layer)| (Part::Layer(index), layer));
        [(Part::Embedding, &self.embedding)].into_iter().chain(layers).chain([(Part::Head, &self.head)])
    }

    /// One part.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn part(&self, part: Part) -> &PartInventory {
        match part {
            Part::Embedding => &self.embedding,
            Part::Layer(index) => &self.layers[index],
            Part::Head => &self.head,
        }
    }

    /// Every matrix of the model.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.parts().flat_map(|(_, part)| &part.linears)
    }

    /// True where running the checkpoint as it says quantizes activations, keys or values.
    pub fn quantizes_activations(&self) -> bool {
        self.linears().any(|linear| linear.scheme.quantizes_activations())
            || self.parts().any(|(_, part)| part.kv.is_some())
    }

    /// True where every decompressed weight is bf16, so that bf16 compute loses nothing of the weights.
    pub fn weights_are_bf16(&self) -> bool {
        self.linears().all(|linear| linear.scheme.operand_dtype() == DType::BF16)
    }
}

struct Builder<'a> {
    source: &'a dyn TensorSource,
    spec: &'a Spec,
    config: Option<&'a QuantizationConfig>,
    matcher: Option<Matcher<'a>>,
    used: BTreeSet<String>,
    ignored: BTreeSet<String>,
}

impl Builder<'_> {
    fn embedding(&mut self) -> Result<PartInventory> {
        let mut part = PartInventory::default();
        let (name, vocab, hidden) = (self.spec.embedding.clone(), self.spec.vocab, self.spec.hidden);
        self.linear(&mut part, &name, (vocab, hidden), LinearClass::Embedding)?;
        Ok(part)
    }

    fn head(&mut self) -> Result<PartInventory> {
        let mut part = PartInventory::default();
        self.vector(&mut part, &self.spec.final_norm, self.spec.hidden)?;
        if !self.spec.tied() {
            let (name, vocab, hidden) = (self.spec.head.clone(), self.spec.vocab, self.spec.hidden);
            self.linear(&mut part, &name, (vocab, hidden), LinearClass::Head)?;
        }
        Ok(part)
    }

    fn layer(&mut self, block: &BlockSpec) -> Result<PartInventory> {
        let hidden = self.spec.hidden;
        let mut part = PartInventory::default();
        self.vector(&mut part, &block.attention_norm, hidden)?;
        self.attention(&mut part, &block.attention)?;
        self.vector(&mut part, &block.ffn_norm, hidden)?;
        match &block.ffn {
            FfnSpec::Gated(gated) => self.gated(&mut part, gated, LinearClass::Ffn)?,
            FfnSpec::Moe { router, experts, .. } => {
                self.linear(&mut part, router, (experts.len(), hidden), LinearClass::Router)?;
                for expert in experts {
                    self.gated(&mut part, expert, LinearClass::Expert)?;
                }
            }
        }
        Ok(part)
    }

    fn attention(&mut self, part: &mut PartInventory, attention: &AttentionSpec) -> Result<()> {
        let hidden = self.spec.hidden;
        let (q, kv) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        for (module, shape, bias) in [
            (&attention.q, (q, hidden), attention.input_bias),
            (&attention.k, (kv, hidden), attention.input_bias),
            (&attention.v, (kv, hidden), attention.input_bias),
            (&attention.o, (hidden, q), attention.output_bias),
        ] {
            self.biased_linear(part, module, shape, LinearClass::Attention, bias)?;
        }
        if let Some((q_norm, k_norm)) = &attention.qk_norm {
            self.vector(part, q_norm, attention.head_dim)?;
            self.vector(part, k_norm, attention.head_dim)?;
        }
        part.kv = self.kv(part, attention)?;
        Ok(())
    }

    fn gated(&mut self, part: &mut PartInventory, gated: &GatedSpec, class: LinearClass) -> Result<()> {
        let hidden = self.spec.hidden;
        for (module, shape) in [
            (&gated.gate, (gated.width, hidden)),
            (&gated.up, (gated.width, hidden)),
            (&gated.down, (hidden, gated.width)),
        ] {
            self.biased_linear(part, module, shape, class, gated.bias)?;
        }
        Ok(())
    }

    /// A linear whose bias the architecture decides: a bias too few or too many changes every number.
    fn biased_linear(
        &mut self,
        part: &mut PartInventory,
        module: &str,
        shape: (usize, usize),
        class: LinearClass,
        bias: bool,
    ) -> Result<()> {
        let name = format!("{module}.bias");
        match (bias, self.source.info(&name)) {
            (true, None) => {
                return Err(Error::missing(self.source.root(), &name, "this architecture has a bias here"));
            }
            (false, Some(_)) => {
                return Err(Error::tensor(
                    self.source.file_of(&name),
                    &name,
                    "config.json describes a linear without a bias here",
                    "restore the config.json of the original model",
                ));
            }
            (true, Some(_)) | (false, None) => {}
        }
        self.linear(part, module, shape, class)
    }

    fn linear(
        &mut self,
        part: &mut PartInventory,
        module: &str,
        (n, k): (usize, usize),
        class: LinearClass,
    ) -> Result<()> {
        let module_class = match class {
            LinearClass::Embedding => ModuleClass::Embedding,
            LinearClass::Attention
            | LinearClass::Ffn
            | LinearClass::Expert
            | LinearClass::Router
            | LinearClass::Head => ModuleClass::Linear,
        };
        let tensors = resolve::tensors_of(self.source, module);
        let mut group = self.matcher.as_ref().and_then(|matcher| matcher.group(module, module_class));
        if self.matcher.as_ref().is_some_and(|matcher| matcher.ignores(module, module_class)) {
            self.ignored.insert(module.to_owned());
        }
        // A router is a parameter rather than a Linear in recent model code: quantizers pass it by without saying so.
        if class == LinearClass::Router && tensors == [format!("{module}.weight")] {
            group = None;
        }
        let scheme = resolve::resolve(self.source, module, (n, k), group)?;
        let bias = format!("{module}.bias");
        if let Some(info) = self.source.info(&bias)
            && !info.dtype.is_dense_float()
        {
            return Err(Error::tensor(
                self.source.file_of(&bias),
                &bias,
                format!("dtype {} where BF16, F16 or F32 is expected", info.dtype),
                "write the checkpoint again",
            ));
        }
        part.linears.push(Linear {
            module: module.to_owned(),
            n,
            k,
            class,
            scheme,
            bias: tensors.contains(&bias),
        });
        self.used.extend(tensors.iter().cloned());
        part.tensors.extend(tensors);
        Ok(())
    }

    fn vector(&mut self, part: &mut PartInventory, module: &str, length: usize) -> Result<()> {
        let tensor = format!("{module}.weight");
        let info = self.source.info(&tensor).ok_or_else(|| {
            Error::missing(self.source.root(), &tensor, "every norm of this architecture has a weight")
        })?;
        let bad = |what: String| {
            Error::tensor(self.source.file_of(&tensor), &tensor, what, "write the checkpoint again")
        };
        if !info.dtype.is_dense_float() {
            return Err(bad(format!("dtype {} where BF16, F16 or F32 is expected", info.dtype)));
        }
        if info.shape != [length] {
            return Err(bad(format!("shape {:?} where [{length}] is expected", info.shape)));
        }
        self.used.insert(tensor.clone());
        part.tensors.push(tensor.clone());
        part.vectors.push(Vector { tensor, length });
        Ok(())
    }

    fn kv(&mut self, part: &mut PartInventory, attention: &AttentionSpec) -> Result<Option<KvScheme>> {
        let module = &attention.module;
        let mut children = vec![&*attention.q, &*attention.k, &*attention.v, &*attention.o];
        children.extend(attention.qk_norm.iter().flat_map(|(q_norm, k_norm)| [&**q_norm, &**k_norm]));
        let group = self.matcher.as_ref().and_then(|matcher| matcher.attention_group(module, &children));
        let of_group = group.and_then(|group| group.input_activations.as_ref());
        let (args, queries) = match (of_group, self.config.and_then(|config| config.kv_cache.as_ref())) {
            (Some(args), _) => (args, true),
            (None, Some(args)) => (args, false),
            (None, None) => return Ok(None),
        };
        let activation = resolve::activation(args).map_err(|what| {
            Error::unsupported(
                self.source.config().path(),
                format!("quantization of keys and values: {what}"),
                "use a static fp8 or int8 scheme for the kv cache",
            )
        })?;
        let undefined = match (activation.scale, activation.sharing) {
            _ if !activation.symmetric => Some("zero points"),
            // The library reduces over [batch, heads]: what a token or a head is there is an accident of the layout.
            (ActivationScale::Dynamic, ActivationSharing::Token | ActivationSharing::Head) => {
                Some("scales found at run time for each token or head")
            }
            _ => None,
        };
        if let Some(what) = undefined {
            return Err(Error::unsupported(
                self.source.config().path(),
                format!("keys and values quantized with {what}"),
                "use a static symmetric scheme for the kv cache",
            ));
        }
        let mut kv = KvScheme { activation, k_scale: None, v_scale: None, q_scale: None, queries };
        match activation.scale {
            ActivationScale::Static => {
                let projections = [("k", &attention.k), ("v", &attention.v), ("q", &attention.q)];
                for (letter, projection) in projections.into_iter().take(if queries { 3 } else { 2 }) {
                    let heads = if letter == "q" { attention.heads } else { attention.kv_heads };
                    let name = self.kv_scale(part, module, projection, letter, heads)?;
                    match letter {
                        "k" => kv.k_scale = Some(name),
                        "v" => kv.v_scale = Some(name),
                        _ => kv.q_scale = Some(name),
                    }
                }
            }
            ActivationScale::Dynamic => {}
            ActivationScale::Local | ActivationScale::PowerOfTwo => {
                return Err(Error::unsupported(
                    self.source.config().path(),
                    format!("keys and values quantized as {activation}"),
                    "use a static fp8 or int8 scheme for the kv cache",
                ));
            }
        }
        Ok(Some(kv))
    }

    /// `self_attn.k_scale` today; `k_proj.output_scale` before August 2024; `k_proj.k_scale` from other writers.
    fn kv_scale(
        &mut self,
        part: &mut PartInventory,
        module: &str,
        projection: &str,
        letter: &str,
        heads: usize,
    ) -> Result<String> {
        let candidates = [
            format!("{module}.{letter}_scale"),
            format!("{projection}.output_scale"),
            format!("{projection}.{letter}_scale"),
        ];
        let found = candidates.iter().find(|name| self.source.info(name).is_some());
        let name = found.cloned().ok_or_else(|| {
            Error::missing(
                self.source.root(),
                &candidates[0],
                "kv_cache_scheme is static, so its scales are stored",
            )
        })?;
        let info = self.source.info(&name).expect("just found");
        let elements: usize = info.shape.iter().product();
        if !info.dtype.is_dense_float() || (elements != 1 && elements != heads) {
            return Err(Error::tensor(
                self.source.file_of(&name),
                &name,
                format!(
                    "{} {:?} where one float, or one for each of {heads} heads, is expected",
                    info.dtype, info.shape
                ),
                "write the checkpoint again",
            ));
        }
        // Zero points of symmetric schemes are written as zeros and used by nobody; they travel along.
        let zero = format!("{module}.{letter}_zero_point");
        if self.source.info(&zero).is_some() && self.used.insert(zero.clone()) {
            part.tensors.push(zero);
        }
        if self.used.insert(name.clone()) {
            part.tensors.push(name.clone());
        }
        Ok(name)
    }
}
