//! Which instruction set runs the kernels, and the one macro that compiles a kernel body for each.

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 512-bit lanes with products of bf16 pairs (`vdpbf16ps`) and of quads of bytes (`vpdpbusd`).
    Avx512Bf16,
    /// 512-bit lanes with fused multiply-add.
    Avx512,
    /// 256-bit lanes with fused multiply-add.
    Avx2,
    /// Whatever the compiler targets; the definition of the others.
    Portable,
}

impl Isa {
    /// All of them, widest first.
    pub const ALL: [Isa; 4] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Portable];

    /// Those that this machine has, widest first.
    pub fn here() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.available())
    }

    /// The widest that this machine has.
    pub fn detect() -> Isa {
        Isa::here().next().unwrap_or(Isa::Portable)
    }

    /// Whether this machine has it.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                Isa::Avx512.available()
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Bf16 | Isa::Avx512 | Isa::Avx2 => false,
        }
    }

    /// Name as printed with a result.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        }
    }
}

/// Defines `fn $name(isa, args)` that runs one of four instances of an inlined body, each compiled for its
/// instruction set. The instances differ in register blocking only, which no sum can see.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) {
        avx512bf16: $avx512bf16:expr, avx512: $avx512:expr, avx2: $avx2:expr, portable: $portable:expr $(,)?
    }) => {
        $(#[$doc])*
        #[expect(unsafe_code, reason = "calling a target_feature function after checking the feature")]
        pub(crate) fn $name(isa: $crate::cpu::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,fma,f16c,avx512bf16,avx512vnni")]
            fn avx512bf16($($arg: $ty),*) {
                $avx512bf16($($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,fma,f16c")]
            fn avx512($($arg: $ty),*) {
                $avx512($($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) {
                $avx2($($arg),*);
            }
            match isa {
                // SAFETY: an `Isa` other than `Portable` is only ever made after `available` said yes.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Isa::Avx512Bf16 => unsafe { avx512bf16($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                $crate::cpu::Isa::Avx512Bf16
                | $crate::cpu::Isa::Avx512
                | $crate::cpu::Isa::Avx2 => $portable($($arg),*),
                $crate::cpu::Isa::Portable => $portable($($arg),*),
            }
        }
    };
    // The same body for all.
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:expr) => {
        $crate::cpu::isa::for_each_isa! {
            $(#[$doc])*
            fn $name($($arg: $ty),*) {
                avx512bf16: $body, avx512: $body, avx2: $body, portable: $body,
            }
        }
    };
}
pub(crate) use for_each_isa;
