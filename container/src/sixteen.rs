//! Sixteen bytes that are rearranged together: one vector register where the processor has them, an array elsewhere.
//! Knows the steps that tiling takes, not why.

#[cfg(target_arch = "x86_64")]
pub(crate) use vector::Sixteen;

#[cfg(not(target_arch = "x86_64"))]
pub(crate) use portable::Sixteen;

#[cfg(target_arch = "x86_64")]
mod vector {
    use safe_arch::{
        m128i, set_splat_i8_m128i, shl_imm_u16_m128i, shr_imm_u16_m128i, unpack_high_i8_m128i,
        unpack_high_i16_m128i, unpack_high_i32_m128i, unpack_high_i64_m128i, unpack_low_i8_m128i,
        unpack_low_i16_m128i, unpack_low_i32_m128i, unpack_low_i64_m128i,
    };

    /// As the portable one, in instructions that every x86-64 has.
    #[derive(Clone, Copy)]
    pub(crate) struct Sixteen(m128i);

    impl Sixteen {
        #[inline(always)]
        pub(crate) fn of(bytes: [u8; 16]) -> Sixteen {
            Sixteen(m128i::from(bytes))
        }

        #[inline(always)]
        pub(crate) fn bytes(self) -> [u8; 16] {
            self.0.into()
        }

        #[inline(always)]
        pub(crate) fn zip<const N: usize>(Sixteen(a): Sixteen, Sixteen(b): Sixteen) -> [Sixteen; 2] {
            match N {
                1 => [unpack_low_i8_m128i(a, b), unpack_high_i8_m128i(a, b)].map(Sixteen),
                2 => [unpack_low_i16_m128i(a, b), unpack_high_i16_m128i(a, b)].map(Sixteen),
                4 => [unpack_low_i32_m128i(a, b), unpack_high_i32_m128i(a, b)].map(Sixteen),
                _ => [unpack_low_i64_m128i(a, b), unpack_high_i64_m128i(a, b)].map(Sixteen),
            }
        }

        #[inline(always)]
        pub(crate) fn zip_nibbles(Sixteen(a): Sixteen, Sixteen(b): Sixteen) -> [Sixteen; 2] {
            let (low, high) = (set_splat_i8_m128i(0x0f), set_splat_i8_m128i(0xf0_u8.cast_signed()));
            let lower = (a & low) | (shl_imm_u16_m128i::<4>(b) & high);
            let upper = (shr_imm_u16_m128i::<4>(a) & low) | (b & high);
            [Sixteen(lower), Sixteen(upper)]
        }
    }
}

#[cfg(any(test, not(target_arch = "x86_64")))]
mod portable {
    /// Sixteen bytes.
    #[derive(Clone, Copy)]
    pub(crate) struct Sixteen([u8; 16]);

    impl Sixteen {
        #[inline(always)]
        pub(crate) fn of(bytes: [u8; 16]) -> Sixteen {
            Sixteen(bytes)
        }

        #[inline(always)]
        pub(crate) fn bytes(self) -> [u8; 16] {
            self.0
        }

        /// Groups of `N` bytes of `a` and `b` in turn, `N` one of 1, 2, 4 and 8: those of the lower halves, and those of
        /// the upper.
        #[inline(always)]
        pub(crate) fn zip<const N: usize>(Sixteen(a): Sixteen, Sixteen(b): Sixteen) -> [Sixteen; 2] {
            let (mut low, mut high) = ([0; 16], [0; 16]);
            for at in 0..8 {
                let to = at / N * 2 * N + at % N;
                (low[to], low[to + N]) = (a[at], b[at]);
                (high[to], high[to + N]) = (a[8 + at], b[8 + at]);
            }
            [Sixteen(low), Sixteen(high)]
        }

        /// Of each byte of `a` and `b` the lower nibbles, that of `a` below; and the upper ones.
        #[inline(always)]
        pub(crate) fn zip_nibbles(Sixteen(a): Sixteen, Sixteen(b): Sixteen) -> [Sixteen; 2] {
            let (mut lower, mut upper) = (a, b);
            for i in 0..16 {
                lower[i] = a[i] & 0x0f | b[i] << 4;
                upper[i] = a[i] >> 4 | b[i] & 0xf0;
            }
            [Sixteen(lower), Sixteen(upper)]
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Sixteen, portable};

    proptest! {
        #[test]
        fn vectors_are_rearranged_as_arrays_are(a: [u8; 16], b: [u8; 16]) {
            let (v, w) = (Sixteen::of(a), Sixteen::of(b));
            let (p, q) = (portable::Sixteen::of(a), portable::Sixteen::of(b));
            prop_assert_eq!(Sixteen::zip::<1>(v, w).map(Sixteen::bytes), portable::Sixteen::zip::<1>(p, q).map(|x| x.bytes()));
            prop_assert_eq!(Sixteen::zip::<2>(v, w).map(Sixteen::bytes), portable::Sixteen::zip::<2>(p, q).map(|x| x.bytes()));
            prop_assert_eq!(Sixteen::zip::<4>(v, w).map(Sixteen::bytes), portable::Sixteen::zip::<4>(p, q).map(|x| x.bytes()));
            prop_assert_eq!(Sixteen::zip::<8>(v, w).map(Sixteen::bytes), portable::Sixteen::zip::<8>(p, q).map(|x| x.bytes()));
            prop_assert_eq!(Sixteen::zip_nibbles(v, w).map(Sixteen::bytes), portable::Sixteen::zip_nibbles(p, q).map(|x| x.bytes()));
        }
    }

    #[test]
    fn bytes_of_both_come_by_turns() {
        let [a, b] = [0, 16].map(|first| portable::Sixteen::of(std::array::from_fn(|i| first + i as u8)));
        let [low, high] = portable::Sixteen::zip::<4>(a, b).map(|x| x.bytes());
        assert_eq!(low, [0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23]);
        assert_eq!(high, [8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31]);
        let [lower, upper] = portable::Sixteen::zip_nibbles(a, b).map(|x| x.bytes());
        assert_eq!((lower[5], upper[5]), (0x55, 0x10));
    }
}
