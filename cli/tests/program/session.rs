//! A folder with a cache of its own in which `ctq` is run. Knows processes and files, nothing of models.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Variables that would let the machine under the test into its results.
const FOREIGN: [&str; 14] = [
    "CTQ_DATA",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
    "RAYON_NUM_THREADS",
    "RUST_BACKTRACE",
    "COLUMNS",
    "CTQ_PORT",
    "CTQ_TOKEN",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_STEP_ID",
    "WORLD_SIZE",
];

/// Longest that a test waits for something to happen in another process.
const PATIENCE: Duration = Duration::from_secs(120);

/// A temporary folder: the working directory of every command that is run in it.
pub(crate) struct Session {
    folder: TempDir,
}

impl Session {
    pub(crate) fn new() -> Session {
        Session { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    /// A session with copies of bundled checkpoints, each in the folder of its name, and `text.txt`.
    pub(crate) fn with(models: &[&str]) -> Session {
        let session = Session::new();
        let bundled = repository().join("golden/bundled");
        for model in models {
            copy_folder(&bundled.join(model), &session.path(model));
        }
        fs::copy(bundled.join("text.txt"), session.path("text.txt")).expect("text.txt is bundled");
        session
    }

    pub(crate) fn root(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.path(name), contents).expect("a file in the temporary folder");
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        let bytes = fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn prepared(&self, mut command: Command) -> Command {
        command.current_dir(self.root()).env("CTQ_CACHE", self.path("cache")).env("HOME", self.path("home"));
        // A GPU of the machine under the test would give other bits.
        command.env("CTQ_DEVICE", "cpu");
        FOREIGN.iter().for_each(|name| {
            command.env_remove(name);
        });
        command
    }

    /// The program with the words of `line` as its arguments, not yet started.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ctq"));
        command.args(line.split_whitespace());
        self.prepared(command)
    }

    /// A shell that finds `ctq` by its name.
    #[cfg(unix)]
    pub(crate) fn shell(&self, script: &str) -> Command {
        let folder = Path::new(env!("CARGO_BIN_EXE_ctq")).parent().expect("the program lies in a folder");
        let mut path = folder.as_os_str().to_owned();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).env("PATH", path).env("LC_ALL", "C");
        self.prepared(command)
    }

    /// Runs the program to its end.
    pub(crate) fn ctq(&self, line: &str) -> Ran {
        self.run(self.command(line))
    }

    pub(crate) fn run(&self, mut command: Command) -> Ran {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        self.ran(&output)
    }

    /// Starts the program and does not wait.
    pub(crate) fn start(&self, line: &str) -> Child {
        let mut command = self.command(line);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// Waits for a program that was started.
    pub(crate) fn wait(&self, child: Child) -> Ran {
        self.ran(&child.wait_with_output().expect("a child to wait for"))
    }

    fn ran(&self, output: &Output) -> Ran {
        // Containers tell absolute paths; on some systems the temporary folder is behind a link.
        let given = self.root().display().to_string();
        let real = fs::canonicalize(self.root()).expect("the temporary folder").display().to_string();
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec()).expect("UTF-8").replace(&real, "DIR").replace(&given, "DIR")
        };
        Ran { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

/// What a program that has ended leaves. The session's folder is `DIR` in it.
#[derive(Debug)]
pub(crate) struct Ran {
    /// None where a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// The same, if the program ended with `code`.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Ran {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// The last line of stderr: why it ended.
    pub(crate) fn last_words(&self) -> &str {
        self.stderr.trim_end().lines().last().unwrap_or_default()
    }
}

/// The repository's root.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).unwrap_or_else(|error| panic!("{}: {error}", from.display())) {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a copied file");
    }
}

/// Every file of a folder with its bytes, in the order of their names.
pub(crate) fn files_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| {
            let entry = entry.expect("an entry");
            (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).expect("a file"))
        })
        .collect();
    files.sort();
    files
}

/// Looks again and again until `happened`; false if the child has ended before that.
pub(crate) fn wait_until(child: &mut Child, happened: impl Fn() -> bool) -> bool {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if happened() {
            return true;
        }
        if child.try_wait().expect("a child").is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("nothing happened within {PATIENCE:?}");
}

/// Sends a signal by its name, such as `INT`.
#[cfg(unix)]
pub(crate) fn signal(child: &Child, name: &str) {
    let id = child.id().to_string();
    let status = Command::new("kill").args(["-s", name, &id]).status().expect("the kill command");
    assert!(status.success(), "kill -s {name}");
}
