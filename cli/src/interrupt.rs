//! SIGINT and SIGTERM: the first asks the work to save and stop, the second stops at once.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Installs the handlers; without them (an odd platform) a signal simply ends the process.
pub(crate) fn install() {
    let flag = flag();
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The order matters: a second signal finds the flag set and exits.
        let _ = signal_hook::flag::register_conditional_shutdown(signal, 3, flag.clone());
        let _ = signal_hook::flag::register(signal, flag.clone());
    }
    // A file size limit (RLIMIT_FSIZE) kills by a signal unless it has a handler; then the write fails and says why.
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::new(AtomicBool::new(false)));
}

/// The flag that work in other crates looks at.
pub(crate) fn flag() -> Arc<AtomicBool> {
    REQUESTED.get_or_init(|| Arc::new(AtomicBool::new(false))).clone()
}

/// Whether a signal has come.
pub(crate) fn requested() -> bool {
    flag().load(Ordering::Relaxed)
}
