//! Two 4-bit codes a byte, the even column in the low half: how fp4 weights lie in `weight_packed`.

/// Unpacks one row into a byte a code.
pub(super) fn unpack(stored: &[u8], codes: &mut [u8]) {
    for (pair, byte) in codes.chunks_mut(2).zip(stored) {
        pair[0] = byte & 15;
        if let Some(odd) = pair.get_mut(1) {
            *odd = byte >> 4;
        }
    }
}

/// The inverse of [`unpack`], into zeros.
pub(super) fn pack(codes: &[u8], stored: &mut [u8]) {
    for (pair, byte) in codes.chunks(2).zip(stored) {
        *byte = pair[0] | pair.get(1).map_or(0, |odd| odd << 4);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_even_column_is_the_low_half() {
        let mut codes = [0; 3];
        unpack(&[0x21, 0x03], &mut codes);
        assert_eq!(codes, [1, 2, 3]);
    }

    proptest! {
        #[test]
        fn pack_undoes_unpack(stored: Vec<u8>) {
            let mut codes = vec![0; stored.len() * 2];
            unpack(&stored, &mut codes);
            let mut again = vec![0; stored.len()];
            pack(&codes, &mut again);
            prop_assert_eq!(again, stored);
        }
    }
}
