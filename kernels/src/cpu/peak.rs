//! The most that one core can do: multiply-add instructions on registers alone, back to back.
//!
//! Each probe runs independent accumulators, as many as the register file has room for, so that neither latency nor
//! memory is in the way. A kernel is held against the instruction that its arithmetic uses. Knows instructions; knows no
//! kernels.

use std::time::Instant;

use serde::{Serialize, Serializer};

use crate::cpu::Isa;

/// How many operations a second one thread does with one instruction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Which.
    pub instruction: Instruction,
    /// A product and its sum are two.
    pub operations_per_second: f64,
}

/// A multiply-add.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Instruction {
    /// `vdpbf16ps`, 512 bits: pairs of bf16 into f32.
    Bf16Dot,
    /// `vpdpbusd`, 512 bits: fours of u8 and i8 into i32.
    ByteDot,
    /// `vfmadd231ps`, 512 bits.
    Fma512,
    /// `vfmadd231ps`, 256 bits.
    Fma256,
    /// A fused multiply-add of two scalars, as the compiler's target has it.
    FmaScalar,
}

/// What a product multiplies and adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Arithmetic {
    /// f32 by f32.
    F32,
    /// bf16 by bf16, sums in f32.
    Bf16,
    /// Integers of 8 bits at most, sums in i32.
    Integers,
}

impl Serialize for Instruction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl Instruction {
    /// All of them.
    pub const ALL: [Instruction; 5] = [
        Instruction::Bf16Dot,
        Instruction::ByteDot,
        Instruction::Fma512,
        Instruction::Fma256,
        Instruction::FmaScalar,
    ];

    /// Name as printed.
    pub const fn name(self) -> &'static str {
        match self {
            Instruction::Bf16Dot => "vdpbf16ps zmm",
            Instruction::ByteDot => "vpdpbusd zmm",
            Instruction::Fma512 => "vfmadd231ps zmm",
            Instruction::Fma256 => "vfmadd231ps ymm",
            Instruction::FmaScalar => "f32 multiply-add",
        }
    }

    /// The fastest that this machine has for an arithmetic.
    pub fn fastest(arithmetic: Arithmetic) -> Instruction {
        let own = match arithmetic {
            Arithmetic::F32 => None,
            Arithmetic::Bf16 => Some(Instruction::Bf16Dot),
            Arithmetic::Integers => Some(Instruction::ByteDot),
        };
        let wide = [Instruction::Fma512, Instruction::Fma256];
        let candidates = own.into_iter().chain(wide);
        candidates.into_iter().find(|instruction| instruction.available()).unwrap_or(Instruction::FmaScalar)
    }

    /// Those that are worth knowing on this machine: the fastest of each arithmetic.
    pub fn here() -> Vec<Instruction> {
        let all = [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Integers];
        let mut found: Vec<Instruction> = Vec::new();
        for instruction in all.map(Instruction::fastest) {
            if !found.contains(&instruction) {
                found.push(instruction);
            }
        }
        found
    }

    /// Whether this machine has it.
    pub fn available(self) -> bool {
        match self {
            Instruction::FmaScalar => true,
            Instruction::Fma512 => Isa::Avx512.available(),
            Instruction::Fma256 => Isa::Avx2.available(),
            // What has only one of the two is used as if it had none.
            Instruction::Bf16Dot | Instruction::ByteDot => Isa::Avx512Bf16.available(),
        }
    }

    /// Operations of one loop of the probe.
    const fn operations(self) -> f64 {
        // Accumulators, lanes, products a lane, two operations a product.
        (match self {
            Instruction::Bf16Dot => 24 * 16 * 2 * 2,
            Instruction::ByteDot => 24 * 16 * 4 * 2,
            Instruction::Fma512 => 24 * 16 * 2,
            Instruction::Fma256 => 12 * 8 * 2,
            Instruction::FmaScalar => 24 * 2,
        }) as f64
    }

    /// Runs it for at least `seconds` on the calling thread: operations a second; `None` where the machine lacks it.
    pub fn measure(self, seconds: f64) -> Option<f64> {
        if !self.available() {
            return None;
        }
        let mut loops = 1000_u64;
        loop {
            let start = Instant::now();
            self.run(loops);
            let elapsed = start.elapsed().as_secs_f64();
            if elapsed >= seconds {
                return Some(self.operations() * loops as f64 / elapsed);
            }
            // A little more than seems right, and never a leap on the word of a clock that did not move.
            let times = (1.2 * seconds / elapsed.max(1e-9)).clamp(2.0, 100.0);
            loops = (loops as f64 * times) as u64;
        }
    }

    fn run(self, loops: u64) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Instruction::Bf16Dot => x86::bf16_dot(loops),
            #[cfg(target_arch = "x86_64")]
            Instruction::ByteDot => x86::byte_dot(loops),
            #[cfg(target_arch = "x86_64")]
            Instruction::Fma512 => x86::fma_512(loops),
            #[cfg(target_arch = "x86_64")]
            Instruction::Fma256 => x86::fma_256(loops),
            #[cfg(not(target_arch = "x86_64"))]
            Instruction::Bf16Dot | Instruction::ByteDot | Instruction::Fma512 | Instruction::Fma256 => {
                unreachable!("no machine but x86-64 has them")
            }
            Instruction::FmaScalar => scalar(loops),
        }
    }
}

/// What one thread does at most, by instruction: those of [`Instruction::here`], a few milliseconds each.
pub fn peaks() -> Vec<Peak> {
    let peak = |instruction: Instruction| {
        let operations_per_second = instruction.measure(PROBE_SECONDS)?;
        Some(Peak { instruction, operations_per_second })
    };
    Instruction::here().into_iter().filter_map(peak).collect()
}

/// Least seconds of one probe.
pub(crate) const PROBE_SECONDS: f64 = 0.01;

/// Independent chains, without anything that only some machines have.
fn scalar(loops: u64) {
    use std::hint::black_box;
    let mut chains = black_box([0.0_f32; 24]);
    let (a, b) = (black_box(0.5_f32), black_box(0.25_f32));
    for _ in 0..loops {
        for chain in &mut chains {
            *chain = a.mul_add(b, *chain);
        }
    }
    black_box(chains);
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "instructions by their names, on registers alone")]
mod x86 {
    use std::arch::asm;

    /// Defines a function that loops over one instruction, with every accumulator in turn and two operands that stay.
    /// All registers are zero.
    macro_rules! probe {
        ($name:ident: $instruction:literal, $clear:literal, $features:literal, $left:tt $right:tt, $($register:tt)*) => {
            pub(super) fn $name(loops: u64) {
                #[target_feature(enable = $features)]
                fn run(loops: u64) {
                    // SAFETY: nothing but the named registers, the flags and the counter changes; the enabled features
                    // have the instruction. `loops` is at least 1.
                    unsafe {
                        asm!(
                            concat!($clear, " ", $left, ", ", $left, ", ", $left),
                            concat!($clear, " ", $right, ", ", $right, ", ", $right),
                            $(concat!($clear, " ", $register, ", ", $register, ", ", $register),)*
                            "2:",
                            $(concat!($instruction, " ", $register, ", ", $left, ", ", $right),)*
                            "dec {loops}",
                            "jnz 2b",
                            loops = inout(reg) loops => _,
                            out($left) _, out($right) _, $(out($register) _,)*
                            options(nomem, nostack),
                        );
                    }
                }
                assert!(loops > 0, "a probe runs at least once");
                // SAFETY: `Instruction::measure` runs nothing that the machine lacks.
                unsafe { run(loops) }
            }
        };
    }

    probe! { bf16_dot: "vdpbf16ps", "vpxord", "avx512f,avx512bf16", "zmm30" "zmm31",
    "zmm0" "zmm1" "zmm2" "zmm3" "zmm4" "zmm5" "zmm6" "zmm7" "zmm8" "zmm9" "zmm10" "zmm11"
    "zmm12" "zmm13" "zmm14" "zmm15" "zmm16" "zmm17" "zmm18" "zmm19" "zmm20" "zmm21" "zmm22" "zmm23" }
    probe! { byte_dot: "vpdpbusd", "vpxord", "avx512f,avx512vnni", "zmm30" "zmm31",
    "zmm0" "zmm1" "zmm2" "zmm3" "zmm4" "zmm5" "zmm6" "zmm7" "zmm8" "zmm9" "zmm10" "zmm11"
    "zmm12" "zmm13" "zmm14" "zmm15" "zmm16" "zmm17" "zmm18" "zmm19" "zmm20" "zmm21" "zmm22" "zmm23" }
    probe! { fma_512: "vfmadd231ps", "vpxord", "avx512f", "zmm30" "zmm31",
    "zmm0" "zmm1" "zmm2" "zmm3" "zmm4" "zmm5" "zmm6" "zmm7" "zmm8" "zmm9" "zmm10" "zmm11"
    "zmm12" "zmm13" "zmm14" "zmm15" "zmm16" "zmm17" "zmm18" "zmm19" "zmm20" "zmm21" "zmm22" "zmm23" }
    probe! { fma_256: "vfmadd231ps", "vxorps", "avx2,fma", "ymm14" "ymm15",
    "ymm0" "ymm1" "ymm2" "ymm3" "ymm4" "ymm5" "ymm6" "ymm7" "ymm8" "ymm9" "ymm10" "ymm11" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_that_is_here_has_a_rate_and_no_other() {
        for instruction in Instruction::ALL {
            let rate = instruction.measure(1e-4);
            assert_eq!(rate.is_some(), instruction.available(), "{}", instruction.name());
            assert!(rate.is_none_or(|rate| rate.is_finite() && rate > 0.0), "{}", instruction.name());
        }
    }

    #[test]
    fn one_peak_for_each_arithmetic_at_most() {
        let here = Instruction::here();
        for arithmetic in [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Integers] {
            let fastest = Instruction::fastest(arithmetic);
            assert!(fastest.available() && here.contains(&fastest), "{arithmetic:?}");
        }
        assert_eq!(peaks().iter().map(|peak| peak.instruction).collect::<Vec<_>>(), here);
    }
}
