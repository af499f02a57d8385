//! The options of `ctq bench`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use ctq_runtime::PLENTY_TOKENS;
use serde::Serialize;

use crate::args::{
    DeviceChoice, LaunchOptions, bench_rows, context, device, positive, several_ranks, threads,
};

/// Where the options of one kind of measurement stand in the help of `ctq bench`.
const WINDOW: &str = "Windows (--window)";
const CONVERSION: &str = "A conversion (--convert)";
const COLLECTIVE: &str = "Ranks (--collective)";

#[derive(Debug, Args)]
#[command(
    after_help = "Without --window, --convert or --collective every operation is measured by itself: linears of each \
                        scheme on the shapes of a model, its head, attention, decoding of packed weights, and what passes \
                        over activations once. On a CPU the same run measures the most that its multiply-add instructions \
                        can do on registers alone, with as many threads; % of peak is of the instruction that the \
                        arithmetic uses. Pin the process and leave the machine alone meanwhile: a figure whose fastest and \
                        slowest round lie apart says more of the neighbours.\n\n\
                        Examples:\n  \
                        ctq bench --threads 1                                    every operation, one core\n  \
                        ctq bench --only linear --scheme w4a16,nvfp4 --compute bf16\n  \
                        ctq bench --window --scheme nvfp4 --acts kernel          a whole window, layers made as it runs\n  \
                        ctq bench --window --shape mistral-123b --layers 2       and what all 88 layers would take\n  \
                        ctq bench --window --windows 73 --weights device         many windows, weights where they are used\n  \
                        ctq bench --convert Llama-3.1-8B-NVFP4/                  against a plain copy of the same bytes"
)]
pub(crate) struct BenchOptions {
    /// What is measured: cpu, cuda, cuda:1 or auto.
    #[arg(long, value_name = "DEVICE", env = "CTQ_DEVICE", hide_env_values = true, default_value = "auto", value_parser = device)]
    pub(crate) device: DeviceChoice,
    /// Model whose shapes are measured [default: llama-1b on a CPU, llama-8b on a GPU].
    #[arg(long, value_enum, value_name = "MODEL", conflicts_with_all = ["convert", "collective"])]
    pub(crate) shape: Option<ShapeChoice>,
    /// Schemes, by the names of compressed-tensors [default: all; for a window w4a16].
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', conflicts_with_all = ["convert", "collective"])]
    pub(crate) scheme: Vec<BenchScheme>,
    /// Quantization of activations: off, library or kernel; what a scheme does not define is left out
    /// [default: off,kernel; for a window off].
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', conflicts_with_all = ["convert", "collective"])]
    pub(crate) acts: Vec<BenchActs>,
    /// Precisions of operands [default: bf16,f32 on a CPU, bf16 on a GPU; for a window bf16].
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', conflicts_with_all = ["convert", "collective"])]
    pub(crate) compute: Vec<BenchCompute>,
    /// Operations that are measured [default: all].
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', conflicts_with_all = ["window", "convert", "collective"])]
    pub(crate) only: Vec<BenchOperation>,
    /// Rows of activations: tokens that a layer sees at once [default: 2048 on a CPU, 8192 on a GPU; with --collective 1,
    /// 256 and 2048, one after the other].
    #[arg(long, value_name = "N", value_parser = bench_rows, conflicts_with_all = ["window", "convert"])]
    pub(crate) rows: Option<usize>,
    /// Rounds of each measurement, of which the median counts [default: 5; of windows and conversions 3].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) rounds: Option<usize>,
    /// Write the measurements to a file (JSON).
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Threads [default: the cores available].
    #[arg(long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,
    /// Attention's query heads, key and value heads, and dimensions of a head, such as 32/8/128 [default: the model's].
    #[arg(long, value_name = "Q/KV/D", value_parser = heads, conflicts_with_all = ["window", "convert", "collective"])]
    pub(crate) heads: Option<HeadsChoice>,
    /// Tokens of a window, and of those that attention is measured on.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = context, conflicts_with_all = ["convert", "collective"])]
    pub(crate) ctx: usize,
    /// Measure windows of a whole model instead, by the engine that `ctq eval` runs, on random codes.
    #[arg(long, help_heading = WINDOW, conflicts_with_all = ["convert", "collective"])]
    pub(crate) window: bool,
    /// Windows that run together.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive, requires = "window", help_heading = WINDOW)]
    pub(crate) windows: usize,
    /// Tokens that go through a layer at once, at most; but at least one window.
    #[arg(long, value_name = "TOKENS", default_value_t = PLENTY_TOKENS, value_parser = positive, requires = "window", help_heading = WINDOW)]
    pub(crate) batch: usize,
    /// Where the layers are when a round begins.
    #[arg(long, value_enum, value_name = "PLACE", default_value = "nowhere", requires = "window", help_heading = WINDOW)]
    pub(crate) weights: WeightsPlace,
    /// Layers that are run; what all would take is reckoned from them [default: all].
    #[arg(long, value_name = "N", value_parser = positive, requires = "window", help_heading = WINDOW)]
    pub(crate) layers: Option<usize>,
    /// Positions at its end that are scored, at most all but the first.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = positive, requires = "window", help_heading = WINDOW)]
    pub(crate) scored: usize,
    /// Measure the conversion of this checkpoint instead, beside a plain copy of as many bytes from and to the same
    /// places. What is written goes to a temporary folder and is removed.
    #[arg(long, value_name = "CHECKPOINT", help_heading = CONVERSION, conflicts_with = "collective")]
    pub(crate) convert: Option<PathBuf>,
    /// Folder that the temporary folder is made in [default: $TMPDIR].
    #[arg(long, value_name = "DIR", requires = "convert", help_heading = CONVERSION)]
    pub(crate) out: Option<PathBuf>,
    /// Measure instead what ranks that share a model hand one another: columns of activations, log-sum-exps, embeddings,
    /// and hidden states from one stage to the next.
    #[arg(long, help_heading = COLLECTIVE)]
    pub(crate) collective: bool,
    /// Ranks that do so, in this process [default: as many as there are GPUs, at least 2]. Where a launcher has started
    /// several processes, each of them is one.
    #[arg(long, value_name = "N", value_parser = several_ranks, requires = "collective", help_heading = COLLECTIVE)]
    pub(crate) tp: Option<usize>,
    #[command(flatten)]
    pub(crate) launch: LaunchOptions,
}

/// A model whose shapes are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShapeChoice {
    /// Llama 3.2 1B: 16 layers, hidden 2048, tied head.
    #[value(name = "llama-1b", alias = "1b")]
    Llama1b,
    /// Llama 3.1 8B: 32 layers, hidden 4096.
    #[value(name = "llama-8b", alias = "8b")]
    Llama8b,
    /// Llama 3.1 70B: 80 layers, hidden 8192.
    #[value(name = "llama-70b", alias = "70b")]
    Llama70b,
    /// Mistral Large 123B: 88 layers, hidden 12288.
    #[value(name = "mistral-123b", aliases = ["llama-123b", "123b"])]
    Mistral123b,
    /// A model of no size to speak of, for tests.
    #[value(name = "tiny", hide = true)]
    Tiny,
}

/// Heads of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadsChoice {
    /// Query heads.
    pub(crate) queries: usize,
    /// Heads of keys and values.
    pub(crate) keys: usize,
    /// Dimensions of each.
    pub(crate) dimensions: usize,
}

fn heads(value: &str) -> Result<HeadsChoice, String> {
    let numbers: Option<Vec<usize>> =
        value.split('/').map(|part| part.parse().ok().filter(|n| *n > 0)).collect();
    match numbers.as_deref() {
        Some([queries, keys, dimensions]) if queries.is_multiple_of(*keys) => {
            Ok(HeadsChoice { queries: *queries, keys: *keys, dimensions: *dimensions })
        }
        Some(_) | None => {
            Err("give query heads, key heads that divide them, and dimensions, such as 32/8/128".to_owned())
        }
    }
}

/// Where the layers of a measured model are when a round begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WeightsPlace {
    /// Each is made when its turn comes and dropped after: a model of any size runs in the memory of two layers.
    Nowhere,
    /// All in host memory, from where each is handed over in every round.
    Host,
    /// All on the device. On a CPU the same as in host memory.
    Device,
}

/// A scheme that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchScheme {
    /// Dense.
    Bf16,
    /// Integers of 4 bits in groups of 128.
    W4a16,
    /// The same with int8 inputs.
    W4a8,
    /// NVFP4, with NVFP4 inputs where activations are quantized.
    Nvfp4,
    /// MXFP4 weights.
    Mxfp4a16,
    /// fp8 by channel, with fp8 inputs by token where activations are quantized.
    Fp8,
    /// Integers of 8 bits by channel, with int8 inputs by token where activations are quantized.
    W8a8,
}

/// Quantization of activations in a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchActs {
    /// Weights only.
    Off,
    /// As compressed-tensors computes it.
    Library,
    /// As serving kernels compute it.
    Kernel,
}

/// Precision of operands in a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchCompute {
    Bf16,
    F32,
}

/// What is measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchOperation {
    /// Linears by scheme and shape.
    Linear,
    /// The head, with the log-sum-exp of each row.
    Head,
    /// Causal attention.
    Attention,
    /// Packed weights to f32; on a GPU to bf16 operands of a library's product.
    Decode,
    /// Norm, gate, residual, rotation, and the preparation of operands.
    Elementwise,
}
