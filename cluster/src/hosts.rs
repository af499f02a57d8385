//! Lists as Slurm writes them: of hosts, and of tasks a node.

/// The first host of a list such as `n[03-04,7]`, `a-n1,b2`, `gpu-[01-02]-ib`.
pub(crate) fn first_host(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list.trim();
    while let Some(at) = rest.find(['[', ',']) {
        host.push_str(&rest[..at]);
        if rest[at..].starts_with(',') {
            return (!host.is_empty()).then_some(host);
        }
        let (numbers, after) = rest[at + 1..].split_once(']')?;
        host.push_str(numbers.split([',', '-']).next()?);
        rest = after;
    }
    host.push_str(rest);
    (!host.is_empty()).then_some(host)
}

/// Tasks of node `node` (from 0) in a list such as `4(x3),2`.
pub(crate) fn tasks_of_node(list: &str, node: usize) -> Option<usize> {
    let mut first = 0;
    for run in list.trim().split(',') {
        let (tasks, nodes) = match run.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')')?.parse::<usize>().ok()?),
            None => (run, 1),
        };
        if node < first + nodes {
            return tasks.parse().ok();
        }
        first += nodes;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_host_of_every_form() {
        for (list, first) in [
            ("n1", "n1"),
            ("n[03-04,7]", "n03"),
            ("n[7]", "n7"),
            ("a-n1,b2", "a-n1"),
            ("gpu-[01-02]-ib", "gpu-01-ib"),
            ("gpu-[05,07]-ib,login", "gpu-05-ib"),
            ("rack[1-2]n[3-4]", "rack1n3"),
            ("10.0.0.1,10.0.0.2", "10.0.0.1"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
        }
        for list in ["", "n[1-2", ",n1"] {
            assert_eq!(first_host(list), None, "{list}");
        }
    }

    #[test]
    fn tasks_of_a_node() {
        let tasks: Vec<Option<usize>> = (0..5).map(|node| tasks_of_node("4(x3),2", node)).collect();
        assert_eq!(tasks, [Some(4), Some(4), Some(4), Some(2), None]);
        assert_eq!(tasks_of_node("8", 0), Some(8));
        assert_eq!(tasks_of_node("8(y2)", 0), None);
    }
}
