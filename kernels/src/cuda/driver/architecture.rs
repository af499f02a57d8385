//! Which target a device's kernels are compiled for: the name that compilers know it by.

/// Lowest compute capability that the kernels run on: asynchronous copies and bf16 matrix products.
pub(super) const LOWEST: (u32, u32) = (8, 0);

/// Targets whose code runs on a device of this compute capability, best first: code with the features of exactly this
/// device, then what runs on it because it is of an earlier device of the same generation.
pub(super) fn targets((major, minor): (u32, u32)) -> Vec<String> {
    // From Hopper on, code with all features of a device has an `a` and runs on no other.
    let own = (major >= 9).then(|| format!("sm_{major}{minor}a"));
    own.into_iter().chain((0..=minor).rev().map(|minor| format!("sm_{major}{minor}"))).collect()
}

/// The best of those that a compiler knows, given the numbers it lists, such as 80 and 90.
pub(super) fn best(capability: (u32, u32), known: &[u32]) -> Option<String> {
    let number = |target: &String| target.trim_start_matches("sm_").trim_end_matches('a').parse().ok();
    targets(capability)
        .into_iter()
        .find(|target| number(target).is_some_and(|number| known.contains(&number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF_12_4: [u32; 12] = [50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 90];
    const OF_13_0: [u32; 11] = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120];

    #[test]
    fn a_device_gets_its_own_target_where_the_compiler_knows_it() {
        let best = |capability| best(capability, &OF_13_0);
        assert_eq!(best((8, 0)).as_deref(), Some("sm_80"));
        assert_eq!(best((8, 9)).as_deref(), Some("sm_89"));
        assert_eq!(best((9, 0)).as_deref(), Some("sm_90a"));
        assert_eq!(best((10, 3)).as_deref(), Some("sm_103a"));
        assert_eq!(best((12, 0)).as_deref(), Some("sm_120a"));
    }

    #[test]
    fn an_unknown_device_gets_an_earlier_one_of_its_generation_or_nothing() {
        assert_eq!(best((8, 9), &OF_12_4).as_deref(), Some("sm_86"));
        assert_eq!(best((12, 1), &OF_13_0).as_deref(), Some("sm_120"));
        assert_eq!(best((10, 0), &OF_12_4), None);
        assert_eq!(best((13, 0), &OF_13_0), None);
    }
}
