//! FNV-1a, the one hash of lockkit: for file formats, keys of tables and the comparison of
//! contents.
//!
//! It guards against accidents, not against forgery. The results are part of file formats, so they
//! never change. The constants are those of the 64-bit variant ([FNV]).
//!
//! [FNV]: http://www.isthe.com/chongo/tech/comp/fnv/

/// The hash of nothing.
pub(crate) const BASIS: u64 = 0xcbf2_9ce4_8422_2325;

/// Adds a byte, or a word where a format hashes words.
#[inline]
pub(crate) fn add(sum: u64, word: u64) -> u64 {
    (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3)
}

/// Returns the hash of the bytes.
pub(crate) fn of_bytes(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(BASIS, |sum, byte| add(sum, u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_matches_published_vectors() {
        for (text, hash) in [
            ("", BASIS),
            ("a", 0xaf63_dc4c_8601_ec8c),
            ("foobar", 0x8594_4171_f739_67e8),
        ] {
            assert_eq!(of_bytes(text.as_bytes()), hash, "{text:?}");
        }
    }
}
