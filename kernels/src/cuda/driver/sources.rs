//! The kernels' sources, as they are compiled into ctq, and which kernel stands in which file.

/// A source file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// Name of the file.
    pub(super) name: &'static str,
    /// What it holds.
    pub(super) text: &'static str,
}

/// Files that are compiled, each by itself: every `.cu` of `kernels/cuda`, by name.
pub(super) const UNITS: &[Source] = include!(concat!(env!("OUT_DIR"), "/units.rs"));

/// Files that those include: every `.cuh`.
pub(super) const HEADERS: &[Source] = include!(concat!(env!("OUT_DIR"), "/headers.rs"));

impl Source {
    /// Kernels that the file plainly defines, by `KERNEL(name, …` or `KERNEL_HOPPER(name, …` at the beginning of a line.
    /// One whose name a macro makes is not among them.
    pub(super) fn kernels(&self) -> impl Iterator<Item = &'static str> {
        let name = |line: &'static str| {
            let rest = line.strip_prefix("KERNEL_HOPPER(").or_else(|| line.strip_prefix("KERNEL("))?;
            rest.split_once(',').map(|(name, _)| name.trim())
        };
        self.text.lines().filter_map(name)
    }
}

/// Places in [`UNITS`], those first that say they define the kernel.
pub(super) fn units_of(kernel: &str) -> Vec<usize> {
    let mut units: Vec<usize> = (0..UNITS.len()).collect();
    units.sort_by_key(|unit| !UNITS[*unit].kernels().any(|name| name == kernel));
    units
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_file_of_the_folder_is_here() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let mut on_disk: BTreeMap<String, String> = BTreeMap::new();
        for entry in fs::read_dir(&folder).expect("the folder of kernels") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_file() {
                on_disk.insert(name, fs::read_to_string(&path).expect("text"));
            }
        }
        let ends = |end: &str| -> Vec<&str> {
            on_disk.keys().filter(|name| name.ends_with(end)).map(String::as_str).collect()
        };
        assert_eq!(UNITS.iter().map(|unit| unit.name).collect::<Vec<_>>(), ends(".cu"), "UNITS");
        assert_eq!(HEADERS.iter().map(|header| header.name).collect::<Vec<_>>(), ends(".cuh"), "HEADERS");
    }

    #[test]
    fn a_kernel_is_looked_for_first_where_it_is_defined() {
        assert_eq!(UNITS[units_of("add")[0]].name, "elementwise.cu");
        let mut all = units_of("no such kernel");
        all.sort_unstable();
        assert_eq!(all, (0..UNITS.len()).collect::<Vec<_>>());
    }

    #[test]
    fn no_two_files_define_a_kernel_of_one_name() {
        let mut seen = BTreeMap::new();
        for unit in UNITS {
            for kernel in unit.kernels() {
                assert_eq!(seen.insert(kernel, unit.name), None, "{kernel} in {}", unit.name);
            }
        }
        assert!(seen.contains_key("add"));
    }
}
