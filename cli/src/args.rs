//! What was typed. Nothing is opened here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ctq_eval::shard::Shard;
use ctq_runtime::Wish;

/// Exact perplexity of quantized checkpoints, weights kept packed.
///
/// ctq reads checkpoints in the compressed-tensors format (NVFP4, W4A16, FP8, W8A8, MXFP4, mixed), repacks them
/// losslessly into tiles, and scores them over the full vocabulary by a named protocol.
#[derive(Debug, Parser)]
#[command(
    name = "ctq",
    version,
    after_help = "Exit codes: 0 good; 1 verdict failed or result invalid; 2 this input or command can never work; \
                  3 interrupted or out of resources, the same command again goes on.\n\n\
                  Start here:\n  ctq demo                         see it work on a bundled model\n  \
                  ctq inspect CHECKPOINT           what is in it, bits per weight\n  \
                  ctq eval CHECKPOINT              perplexity on WikiText-2"
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) output: OutputOptions,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where the options of every command stand in their help: apart from those of the command itself.
const MESSAGES: &str = "Messages";

/// How much is said, and where.
#[derive(Debug, Args)]
pub(crate) struct OutputOptions {
    /// Say nothing but results, warnings and errors.
    #[arg(short, long, global = true, help_heading = MESSAGES)]
    pub(crate) quiet: bool,
    /// Say more: files, groups, memory.
    #[arg(short, long, global = true, help_heading = MESSAGES, conflicts_with = "quiet")]
    pub(crate) verbose: bool,
    /// Write everything that is said, with times, to a file too. Of several processes, the second writes to FILE.rank1.
    #[arg(long, global = true, help_heading = MESSAGES, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Repack a checkpoint into a tiled container, losslessly.
    Convert(ConvertOptions),
    /// Regenerate the original checkpoint from a container, byte for byte.
    Restore(RestoreOptions),
    /// Say what a checkpoint or container holds: schemes, bits per weight, what cannot be run.
    Inspect(InspectOptions),
    /// Score checkpoints or containers: perplexity by a named protocol.
    Eval(EvalOptions),
    /// Join the parts that `eval --shard` has written into the result of one run.
    Merge(MergeOptions),
    /// Hold the runtime against an independent reference, layer by layer, and the container against its source.
    Verify(VerifyOptions),
    /// Write full-vocabulary logits for given token ids.
    Logits(LogitsOptions),
    /// Convert, score and verify the bundled checkpoints.
    Demo(DemoOptions),
    /// Say what this machine has to compute with, what ctq takes of it, and what would help it to more.
    Doctor(DoctorOptions),
    /// Measure how fast this machine is: every operation by itself, a whole window, a conversion, or what ranks hand one
    /// another.
    Bench(crate::bench::options::BenchOptions),
}

/// Options of whatever reads a model.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ModelOptions {
    /// Go on although ctq does not know this key of config.json: it does not change the numbers. May be given several
    /// times.
    #[arg(long, value_name = "KEY")]
    pub(crate) accept_config_key: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "A killed convert goes on where it was when the same command is given again.\n\n\
                        Example:\n  ctq convert Llama-3.1-8B-NVFP4/ llama-nvfp4.ctq/")]
pub(crate) struct ConvertOptions {
    /// Folder of the checkpoint: config.json and safetensors files.
    pub(crate) input: PathBuf,
    /// Folder to write; made if it is not there.
    pub(crate) output: PathBuf,
    /// Replace a container that is there already.
    #[arg(long)]
    pub(crate) force: bool,
    /// Layers worked on at a time [default: the cores available].
    #[arg(long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,
    #[command(flatten)]
    pub(crate) model: ModelOptions,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreOptions {
    /// The container.
    pub(crate) input: PathBuf,
    /// Folder to write the checkpoint to; must not exist or be empty.
    pub(crate) output: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct InspectOptions {
    /// Checkpoint or container.
    pub(crate) path: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) model: ModelOptions,
}

/// Precision and devices.
#[derive(Clone, Debug, Args)]
pub(crate) struct EngineOptions {
    /// What computes: cpu; cuda, the GPUs that can be used; cuda:1, the second alone; or auto, GPUs where there are any.
    /// A GPU that is there and cannot be used is an error. `ctq doctor` tells what there is.
    #[arg(long, value_name = "DEVICE", env = "CTQ_DEVICE", hide_env_values = true, default_value = "auto", value_parser = device)]
    pub(crate) device: DeviceChoice,
    /// Precision of operands; auto: bf16 when every decompressed weight is bf16, else f32.
    #[arg(long, value_enum, default_value_t = ComputeChoice::Auto)]
    pub(crate) compute: ComputeChoice,
    /// Ranks that share every linear by output rows, each on a device of its own where there are as many. The scores do
    /// not change.
    #[arg(long, value_name = "N", value_parser = ranks)]
    pub(crate) tp: Option<usize>,
    /// Threads [default: the cores available]. The scores do not change.
    #[arg(long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,
}

/// Which device computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceChoice {
    /// A GPU where there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The first GPU that can be used.
    Cuda,
    /// The GPU of this number.
    CudaAt(usize),
}

/// Where the options of several processes stand in the help of a command.
const PROCESSES: &str = "Several processes";

/// Several processes, started by a launcher.
#[derive(Clone, Debug, Args)]
pub(crate) struct LaunchOptions {
    /// What has started several processes of this command, one a device: torchrun, srun or mpirun, by the variables that
    /// they set; none: each process stands alone.
    #[arg(long, value_enum, default_value_t = LauncherChoice::Auto, help_heading = PROCESSES)]
    pub(crate) launcher: LauncherChoice,
    /// Seconds that processes wait for one another at the beginning.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = seconds, help_heading = PROCESSES)]
    pub(crate) wait: f64,
}

impl Default for LaunchOptions {
    fn default() -> LaunchOptions {
        LaunchOptions { launcher: LauncherChoice::None, wait: 60.0 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LauncherChoice {
    /// Whichever has left its variables.
    Auto,
    /// Nothing.
    None,
    /// torchrun, or whoever sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    Torchrun,
    /// srun.
    Slurm,
    /// mpirun of Open MPI, MPICH or Intel MPI.
    Mpi,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeChoice {
    Auto,
    Bf16,
    F32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActsChoice {
    /// Off, and beside it library where the checkpoint quantizes activations.
    Auto,
    /// Weights only.
    Off,
    /// As compressed-tensors computes it.
    Library,
    /// As serving kernels compute it.
    Kernel,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct EvalOptions {
    /// Checkpoints or containers; several give one table.
    #[arg(value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) protocol: ProtocolOptions,
    /// Quantization of activations.
    #[arg(long, value_enum, default_value_t = ActsChoice::Auto)]
    pub(crate) acts: ActsChoice,
    #[command(flatten)]
    pub(crate) engine: EngineOptions,
    /// Stages that share the layers, each with `--tp` ranks; several groups of windows are under way at a time. The scores
    /// do not change. Without --tp and --pp all GPUs are used, as suits the model.
    #[arg(long, value_name = "N", value_parser = ranks)]
    pub(crate) pp: Option<usize>,
    /// Memory that may be taken, such as 8G or 512M: on the CPU for hidden states [default: half of what is free], of each
    /// GPU for everything [default: what is free]. The scores do not change.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory: Option<u64>,
    /// Write the results to a file as a list of records.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write each position's nll with its window and position (safetensors). A second record gets its own file.
    #[arg(long, value_name = "FILE")]
    pub(crate) nll: Option<PathBuf>,
    /// Score only the windows of one of N equal parts, counted from 1, and write them to the file of --json:
    /// `ctq merge` joins all parts into the result of one run. Parts are independent of one another, as the tasks of a
    /// job array are.
    #[arg(long, value_name = "I/N", value_parser = shard)]
    pub(crate) shard: Option<Shard>,
    /// Score nothing: print which windows, layers and rows would go to which device, what that takes, what crosses between
    /// devices, and how large a model could be. With --json also to a file.
    #[arg(long, conflicts_with = "shard")]
    pub(crate) dry_run: bool,
    /// Keep the hidden states on disk at most this often, so that a killed run loses little.
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0, value_parser = seconds)]
    pub(crate) save_every: f64,
    #[command(flatten)]
    pub(crate) launch: LaunchOptions,
    #[command(flatten)]
    pub(crate) model: ModelOptions,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The result has the bits of one run. Its time is the sum of all parts, its tokens per second are \
                        those of one part at work, its memory is that of the part that took most.\n\n\
                        Example:\n  \
                        ctq eval model/ --shard 1/2 --json part-1.json      here\n  \
                        ctq eval model/ --shard 2/2 --json part-2.json      on another machine\n  \
                        ctq merge part-1.json part-2.json --json result.json"
)]
pub(crate) struct MergeOptions {
    /// All part files of one evaluation, in any order.
    #[arg(value_name = "PART", required = true)]
    pub(crate) parts: Vec<PathBuf>,
    /// Write the results to a file as a list of records.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write each position's nll with its window and position (safetensors). A second record gets its own file.
    #[arg(long, value_name = "FILE")]
    pub(crate) nll: Option<PathBuf>,
}

impl EvalOptions {
    /// How devices are to share the work, where that was said.
    pub(crate) fn wish(&self) -> Wish {
        Wish { ranks: self.engine.tp, stages: self.pp }
    }
}

/// What is asked: text, windows, scored positions.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ProtocolOptions {
    /// Text: .txt (one row), .raw, .jsonl (a `text` field) or Parquet (a `text` column)
    /// [default: $CTQ_DATA, else WikiText-2 in the Hugging Face cache].
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Protocol by name; `--preset help` lists them.
    #[arg(long, value_name = "NAME", default_value = ctq_eval::protocol::DEFAULT_PRESET)]
    pub(crate) preset: String,
    /// Tokens of one window.
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub(crate) ctx: Option<usize>,
    /// Tokens from one window's start to the next.
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub(crate) stride: Option<usize>,
    /// Windows at most.
    #[arg(long, value_name = "WINDOWS", value_parser = positive)]
    pub(crate) rows: Option<usize>,
    /// Cut the stream to its first tokens.
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub(crate) max_tokens: Option<usize>,
    /// Beginning-of-sequence token: default, none, once, every-window, replace-first or llamacpp.
    #[arg(long, value_name = "RULE")]
    pub(crate) bos: Option<ctq_eval::protocol::BosRule>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyOptions {
    /// Container or checkpoint.
    pub(crate) path: PathBuf,
    /// Checkpoint to hold it against [default: the source recorded in the container].
    #[arg(long, value_name = "CHECKPOINT")]
    pub(crate) against: Option<PathBuf>,
    /// Tokens to run.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    pub(crate) tokens: usize,
    /// Layers to hold against the reference, such as 0,43,87 [default: all].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) layers: Vec<usize>,
    /// Only bits: round trip and weight operands, no forward pass.
    #[arg(long)]
    pub(crate) bits_only: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
    /// What the runtime computes on: cpu, cuda, cuda:1 or auto. The reference stays on the CPU.
    #[arg(long, value_name = "DEVICE", env = "CTQ_DEVICE", hide_env_values = true, default_value = "auto", value_parser = device)]
    pub(crate) device: DeviceChoice,
    /// Threads [default: the cores available].
    #[arg(long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,
    #[command(flatten)]
    pub(crate) model: ModelOptions,
}

#[derive(Debug, Args)]
pub(crate) struct LogitsOptions {
    /// Checkpoint or container.
    pub(crate) path: PathBuf,
    /// safetensors file with `input_ids` [B, S], I64 or I32.
    #[arg(long, value_name = "FILE")]
    pub(crate) ids: PathBuf,
    /// safetensors file to write: `logits` [B, S, V] F32.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Quantization of activations.
    #[arg(long, value_enum, default_value_t = LogitsActs::Off)]
    pub(crate) acts: LogitsActs,
    #[command(flatten)]
    pub(crate) engine: EngineOptions,
    #[command(flatten)]
    pub(crate) model: ModelOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogitsActs {
    /// Weights only.
    Off,
    /// As compressed-tensors computes it.
    Library,
    /// As serving kernels compute it.
    Kernel,
}

#[derive(Debug, Args)]
pub(crate) struct DemoOptions {
    /// Keep the converted containers here [default: a temporary folder that is removed].
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<PathBuf>,
    /// Threads [default: the cores available].
    #[arg(long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorOptions {
    /// Print one JSON object instead of text.
    #[arg(long, conflicts_with = "check")]
    pub(crate) json: bool,
    /// Hold every operation of a device against the CPU instead, on random data: small takes seconds, large has the
    /// sizes of models.
    #[arg(long, value_enum, value_name = "SIZE")]
    pub(crate) check: Option<CheckSize>,
    /// What is checked: cuda, cuda:1 or auto.
    #[arg(long, value_name = "DEVICE", env = "CTQ_DEVICE", hide_env_values = true, default_value = "auto", value_parser = device)]
    pub(crate) device: DeviceChoice,
    /// Write what the check found, case by case, to a file (JSON).
    #[arg(long, value_name = "FILE", requires = "check")]
    pub(crate) findings: Option<PathBuf>,
}

/// How large the cases of a check are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CheckSize {
    /// Awkward shapes, a few tiles each.
    Small,
    /// Shapes of models.
    Large,
}

pub(crate) fn device(text: &str) -> Result<DeviceChoice, String> {
    let choice = match text {
        "auto" => Some(DeviceChoice::Auto),
        "cpu" => Some(DeviceChoice::Cpu),
        "cuda" => Some(DeviceChoice::Cuda),
        other => other.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(DeviceChoice::CudaAt),
    };
    choice.ok_or_else(|| {
        "expected auto, cpu, cuda, or cuda:N with the number of a GPU as `ctq doctor` lists them".to_owned()
    })
}

fn shard(text: &str) -> Result<Shard, String> {
    text.parse()
        .map_err(|_| "expected I/N with I from 1 to N, such as 2/8 for the second of eight parts".to_owned())
}

pub(crate) fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a whole number of at least 1".to_owned()),
        Ok(number) => Ok(number),
    }
}

fn at_most(text: &str, most: usize) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        Ok(_) | Err(_) => Err(format!("expected a whole number from 1 to {most}")),
    }
}

/// More than any machine has; what they take is reserved when they start.
pub(crate) fn threads(text: &str) -> Result<usize, String> {
    at_most(text, 1024)
}

/// One alone has nobody to hand things to.
pub(crate) fn several_ranks(text: &str) -> Result<usize, String> {
    let several = ranks(text).ok().filter(|ranks| *ranks > 1);
    several.ok_or_else(|| "expected a whole number from 2 to 64".to_owned())
}

/// Each takes the activations once more.
fn ranks(text: &str) -> Result<usize, String> {
    at_most(text, 64)
}

/// A window of which anything can be scored, and whose hidden states fit.
pub(crate) fn context(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(tokens) if (2..=1 << 20).contains(&tokens) => Ok(tokens),
        Ok(_) | Err(_) => Err(format!("expected a whole number from 2 to {}", 1 << 20)),
    }
}

/// The widest result of as many rows has 15 GB.
pub(crate) fn bench_rows(text: &str) -> Result<usize, String> {
    at_most(text, 1 << 17)
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        // Thirty years: what is more is no time that a machine can count.
        Ok(number) if (0.0..=1e9).contains(&number) => Ok(number),
        Ok(_) | Err(_) => Err("expected a number of seconds".to_owned()),
    }
}

/// `8G`, `512M`, `1.5GiB`, `1000000`: powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1_u64,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err("expected a size such as 8G or 512M".to_owned()),
    };
    match digits.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok((number * unit as f64) as u64),
        Ok(_) | Err(_) => Err("expected a size such as 8G or 512M".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn devices_are_named_and_counted_from_0() {
        assert_eq!(device("auto"), Ok(DeviceChoice::Auto));
        assert_eq!(device("cpu"), Ok(DeviceChoice::Cpu));
        assert_eq!(device("cuda"), Ok(DeviceChoice::Cuda));
        assert_eq!(device("cuda:3"), Ok(DeviceChoice::CudaAt(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "0"] {
            assert!(device(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shards_are_counted_from_1() {
        assert_eq!(shard("2/8").map(|shard| (shard.part(), shard.of())), Ok((2, 8)));
        for wrong in ["0/8", "9/8", "8", "", "/"] {
            assert!(shard(wrong).is_err_and(|told| told.contains("I from 1 to N")), "{wrong}");
        }
    }

    #[test]
    fn counts_that_no_machine_has_are_refused() {
        assert_eq!((threads("16"), ranks("64"), bench_rows("131072")), (Ok(16), Ok(64), Ok(131_072)));
        for wrong in ["0", "-1", "x", "18446744073709551615", "99999999999999999999"] {
            for parse in [threads, ranks, bench_rows] {
                assert!(parse(wrong).is_err(), "{wrong}");
            }
        }
        assert_eq!(ranks("65").expect_err("too many"), "expected a whole number from 1 to 64");
    }

    #[test]
    fn one_rank_hands_nothing_over() {
        assert_eq!((several_ranks("2"), several_ranks("64")), (Ok(2), Ok(64)));
        for wrong in ["0", "1", "65", "x"] {
            assert!(several_ranks(wrong).is_err_and(|told| told.contains("from 2 to 64")), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_read_in_powers_of_1024() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("8X").is_err());
        assert!(size("-1G").is_err());
    }
}
