//! The values in etcd's JSON: numbers of 64 bits are strings, zero or empty values are omitted,
//! bytes are base64.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

/// Returns bytes as JSON contains them.
pub(super) fn encode(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

/// Returns the text of bytes in JSON; empty if there are none.
pub(super) fn decode(value: &Value) -> String {
    let bytes = value.as_str().and_then(|text| STANDARD.decode(text).ok());
    String::from_utf8(bytes.unwrap_or_default()).unwrap_or_default()
}

/// Returns a number, which JSON may contain as a string, or omit if it is zero.
pub(super) fn number(value: &Value) -> u64 {
    value
        .as_str()
        .and_then(|text| text.parse().ok())
        .or_else(|| value.as_u64())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn read_json_of_gateway_returns_values() {
        assert_eq!(
            (
                number(&json!("12")),
                number(&json!(12)),
                number(&Value::Null)
            ),
            (12, 12, 0)
        );
        assert_eq!(decode(&json!(encode("held"))), "held");
        assert_eq!(decode(&Value::Null), "");
    }
}
