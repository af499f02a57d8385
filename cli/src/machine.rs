//! What this machine has: threads and memory, within the limits that a container or scheduler sets. Knows nothing of
//! models.

use std::fs;
use std::num::NonZero;

use anyhow::Context;
use ctq_runtime::Workers;

/// Threads this process may use.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// A pool of as many threads as were asked for, or as there are.
pub(crate) fn pool(asked: Option<usize>) -> anyhow::Result<rayon::ThreadPool> {
    let count = NonZero::new(asked.unwrap_or_else(threads)).unwrap_or(NonZero::<usize>::MIN);
    let (mut workers, _) = workers(count, 1);
    workers.remove(0).pool().context("cannot start threads; ask for fewer with --threads")
}

/// Workers of each of `seats` seats, `count` each, and where they run, for people.
///
/// They are bound where every core has one of them: seats then have neighbouring cores, and so mostly those of one node
/// of the machine's memory. Fewer are left to the system, for other programs may be bound to the same cores; and more
/// would wait for one another.
pub(crate) fn workers(count: NonZero<usize>, seats: usize) -> (Vec<Workers>, String) {
    workers_on(&cores(), count, seats)
}

fn workers_on(cores: &[usize], count: NonZero<usize>, seats: usize) -> (Vec<Workers>, String) {
    let threads = count.get() * seats;
    if threads == cores.len() {
        let bound = cores.chunks(count.get()).filter_map(|cores| Workers::bound(cores.to_vec()));
        return (bound.collect(), format!("threads: {threads}, one bound to each core"));
    }
    let of = if cores.is_empty() { String::new() } else { format!(" on {} cores", cores.len()) };
    (vec![Workers::anywhere(count); seats], format!("threads: {threads}{of}, bound to none"))
}

/// The cores that this process may use, as the system numbers them; empty where that is not known.
#[cfg(target_os = "linux")]
fn cores() -> Vec<usize> {
    use rustix::thread::{CpuSet, sched_getaffinity};

    let set = sched_getaffinity(None);
    set.map_or_else(|_| Vec::new(), |set| (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect())
}

#[cfg(not(target_os = "linux"))]
fn cores() -> Vec<usize> {
    Vec::new()
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

/// Resident memory that is no page of a file, now, in bytes.
pub(crate) fn anonymous_memory() -> Option<u64> {
    field("/proc/self/status", "RssAnon:")
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
    fn workers_are_bound_where_each_core_has_one() {
        let two = NonZero::new(2).expect("two");
        let bound = |cores: &[usize]| Workers::bound(cores.to_vec()).expect("cores");
        assert_eq!(workers_on(&[1, 2, 5, 7], two, 2).0, [bound(&[1, 2]), bound(&[5, 7])]);
        for cores in [&[1][..], &[0, 1, 2], &[0, 1, 2, 3, 4], &[]] {
            assert_eq!(workers_on(cores, two, 2).0, [Workers::anywhere(two), Workers::anywhere(two)]);
        }
        assert_eq!(workers_on(&[3, 4, 5], two, 1).1, "threads: 2 on 3 cores, bound to none");
    }

    #[test]
    fn pages_of_files_are_not_lost_room() {
        let stat = "anon 7\nfile 90\ninactive_file 30\nactive_file 50\ntotal_inactive_file 31\n";
        assert_eq!((reclaimable(stat, ""), reclaimable(stat, "total_")), (80, 31));
        assert_eq!(reclaimable("", ""), 0);
    }
}
