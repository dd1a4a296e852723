//! DSSE v1: a payload, and signatures over its type and its exact bytes.
//! github.com/secure-systems-lab/dsse, protocol.md and envelope.md.
#![forbid(unsafe_code)]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::{Deserialize, Serialize};

use crate::envelope::key::{Jwks, SigningKey};
use crate::envelope::{EnvelopeError, PAYLOAD_TYPE};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    #[serde(rename = "payloadType")]
    payload_type: String,
    payload: String,
    signatures: Vec<Signature>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signature {
    keyid: String,
    sig: String,
}

/// More would be a way to make us try keys.
const MOST_SIGNATURES: usize = 16;

/// Verifiers take either alphabet (protocol.md). Trailing bits must be zero, so that there is one text for
/// one payload.
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

pub(super) fn seal(payload: &[u8], key: &SigningKey) -> String {
    let sealed = Sealed {
        payload_type: PAYLOAD_TYPE.to_owned(),
        payload: STANDARD.encode(payload),
        signatures: vec![Signature {
            keyid: key.public().kid().to_owned(),
            sig: STANDARD.encode(key.sign(&pre_authentication(PAYLOAD_TYPE, payload))),
        }],
    };
    // Cannot fail: keys are text, values owned data. Nothing accepts an empty text as an envelope.
    serde_json::to_string(&sealed).unwrap_or_default()
}

/// The payload, once a known key vouches for it. Signatures of unknown keys are passed over, and one of a
/// known key that does not fit refuses the whole.
pub(super) fn open(bytes: &[u8], keys: &Jwks) -> Result<Vec<u8>, EnvelopeError> {
    let malformed = |why: &str| EnvelopeError::Malformed(why.to_owned());
    let sealed: Sealed =
        serde_json::from_slice(bytes).map_err(|e| EnvelopeError::Malformed(e.to_string()))?;
    if sealed.payload_type != PAYLOAD_TYPE {
        return Err(EnvelopeError::OtherType(shown(&sealed.payload_type)));
    }
    let payload = decoded(&sealed.payload).ok_or_else(|| malformed("its payload is no base64"))?;
    if sealed.signatures.len() > MOST_SIGNATURES {
        return Err(malformed("it has more than 16 signatures"));
    }
    let Some(first) = sealed.signatures.first() else {
        return Err(malformed("it has no signature"));
    };
    let message = pre_authentication(PAYLOAD_TYPE, &payload);
    let mut is_vouched_for = false;
    for Signature { keyid, sig } in &sealed.signatures {
        let Some(key) = keys.key(keyid) else { continue };
        let signature: [u8; 64] = decoded(sig)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| malformed("a signature is no base64 of 64 bytes"))?;
        if !key.verifies(&message, &signature) {
            return Err(EnvelopeError::BadSignature(shown(keyid)));
        }
        is_vouched_for = true;
    }
    if is_vouched_for { Ok(payload) } else { Err(EnvelopeError::UnknownKey(shown(&first.keyid))) }
}

/// What is signed: type and payload with their lengths, so that no other pair has the same bytes.
pub(super) fn pre_authentication(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes =
        format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

fn decoded(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).or_else(|_| URL_SAFE.decode(text)).ok()
}

/// Of a stranger's text, as much as an error should hold.
fn shown(text: &str) -> String {
    text.chars().take(80).map(|c| if c.is_control() { '?' } else { c }).collect()
}
