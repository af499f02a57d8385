//! What this machine has: threads and memory, within the limits that a container or scheduler sets. Knows nothing of
//! models.

use std::fs;
use std::num::NonZero;

use anyhow::Context;

/// Threads this process may use.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// A pool of as many threads as were asked for, or as there are.
pub(crate) fn pool(asked: Option<usize>) -> anyhow::Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(asked.unwrap_or_else(threads)).build();
    pool.context("cannot start threads; ask for fewer with --threads")
}

/// Memory that could be taken now without swapping, in bytes; `None` where it cannot be known.
pub(crate) fn available_memory() -> Option<u64> {
    let available = field("/proc/meminfo", "MemAvailable:")?;
    Some(cgroup_room().map_or(available, |room| room.min(available)))
}

/// What is left of the memory limit of this process's cgroup (version 2, then 1). Pages of files that were read count
/// as used there and are given up when memory is wanted: without them a model that was read once would fill it.
fn cgroup_room() -> Option<u64> {
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let two = || {
        let room = (number("memory.max")?, number("memory.current")?);
        Some((room, reclaimable(&read("memory.stat")?, "")))
    };
    let one = || {
        let room = (number("memory/memory.limit_in_bytes")?, number("memory/memory.usage_in_bytes")?);
        Some((room, reclaimable(&read("memory/memory.stat")?, "total_")))
    };
    let ((limit, used), reclaimable) = two().or_else(one)?;
    Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
}

/// Bytes of a cgroup that are pages of files, from its `memory.stat`; `prefix`: of the fields that count its children.
fn reclaimable(stat: &str, prefix: &str) -> u64 {
    let field = |name: &str| {
        let value = stat.lines().find_map(|line| line.strip_prefix(prefix)?.strip_prefix(name));
        value.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    field("inactive_file ") + field("active_file ")
}

/// Forgets the peak so far, so that [`peak_memory`] is of what follows. Where the system cannot, the peak stays that
/// of the whole process.
pub(crate) fn reset_peak_memory() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Largest resident memory since the last reset, in bytes.
pub(crate) fn peak_memory() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

/// A field in kB of a file of /proc, in bytes.
fn field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = value.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_files_are_not_lost_room() {
        let stat = "anon 7\nfile 90\ninactive_file 30\nactive_file 50\ntotal_inactive_file 31\n";
        assert_eq!((reclaimable(stat, ""), reclaimable(stat, "total_")), (80, 31));
        assert_eq!(reclaimable("", ""), 0);
    }
}
