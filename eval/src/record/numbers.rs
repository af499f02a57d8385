//! Numbers for people: as many digits as mean something.
//!
//! Knows rounding only. Records keep every bit; only renderings come here.

/// A perplexity: four decimals, or five significant digits where it is beyond reason.
pub(super) fn perplexity(value: f64) -> String {
    if value < 1e6 { format!("{value:.4}") } else { format!("{value:.4e}") }
}

/// An error or a size, to three significant digits.
pub(super) fn significant(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if value >= 1e6 {
        return format!("{value:.2e}");
    }
    let magnitude = libm::floor(libm::log10(value)) as i32;
    let decimals = (2 - magnitude).clamp(0, 12) as usize;
    format!("{value:.decimals$}")
}

/// A ratio and its error as a signed change in percent.
pub(super) fn change(ratio: f64, error: Option<f64>) -> String {
    let error = error.map(|error| format!(" ± {}", significant(100.0 * error)));
    format!("{:+.3}{} %", 100.0 * (ratio - 1.0), error.unwrap_or_default())
}

/// Bits per weight: three decimals, or two where the third is 0.
pub(super) fn bpw(value: f64) -> String {
    let mut shown = format!("{value:.3}");
    if shown.ends_with('0') {
        shown.pop();
    }
    shown
}

/// A duration in seconds, as `41.2 s`, `12 min 05 s` or `3 h 07 min`.
pub(super) fn seconds(value: f64) -> String {
    let whole = value.round() as u64;
    if whole < 60 {
        format!("{value:.1} s")
    } else if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
    }
}

/// Bytes in binary units.
pub(super) fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = value as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value} B") } else { format!("{size:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_are_kept() {
        let shown: Vec<String> = [1.2345, 0.012345, 123.45, 12345.0, 0.0, 9.9999].map(significant).to_vec();
        assert_eq!(shown, ["1.23", "0.0123", "123", "12345", "0", "10.00"]);
    }

    #[test]
    fn sizes_and_times_change_units() {
        assert_eq!([bytes(512), bytes(1536), bytes(5 << 30)], ["512 B", "1.5 KiB", "5.0 GiB"]);
        assert_eq!(
            [seconds(41.24), seconds(725.0), seconds(11_220.0)],
            ["41.2 s", "12 min 05 s", "3 h 07 min"]
        );
        assert_eq!([change(1.002577, None), change(0.99, Some(0.0005))], ["+0.258 %", "-1.000 ± 0.0500 %"]);
        assert_eq!([4.5, 4.125, 16.0].map(bpw), ["4.50", "4.125", "16.00"]);
    }
}
