//! Every answer that is no success: a status and `{"error":{"stage","reason","message","hint"}}`.
#![forbid(unsafe_code)]

use std::borrow::Cow;

use axum::body::Body;
use axum::http::header::{CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderValue, Response, StatusCode};
use axum::response::IntoResponse;

use crate::api::wire::{ErrorBody, ErrorObject};
use crate::broker::BrokerError;
use crate::launcher::compile::chain;
use crate::model::verdict::DenyReason;
use crate::run::RunError;

/// `application/json`.
pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Refusal {
    pub status: StatusCode,
    pub stage: Cow<'static, str>,
    /// A name that programs match on.
    pub reason: Cow<'static, str>,
    pub message: String,
    pub hint: String,
    /// The connection is of no use afterwards.
    pub closes: bool,
}

impl Refusal {
    fn request(status: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            stage: "request".into(),
            reason: reason.into(),
            message: message.into(),
            hint: String::new(),
            closes: false,
        }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    #[must_use]
    pub fn closing(mut self) -> Self {
        self.closes = true;
        self
    }

    /// The message may quote what was sent: its middle is left out where it is long.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::request(StatusCode::BAD_REQUEST, "malformed", without_middle(message.into()))
    }

    /// As the broker says it of what is not there, or is another run's.
    pub fn not_found(what: impl Into<String>) -> Self {
        BrokerError::NotFound { what: what.into() }.into()
    }

    pub fn no_such_path() -> Self {
        Self::not_found("such path on this socket").hint("GET /v1/openapi.json describes all")
    }

    pub fn method_not_allowed() -> Self {
        let status = StatusCode::METHOD_NOT_ALLOWED;
        Self::request(status, "method_not_allowed", "this path does not take this method here")
            .hint("GET /v1/openapi.json says which socket takes which")
    }

    pub fn not_json() -> Self {
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        Self::request(status, "unsupported_media_type", "the body is not said to be JSON")
            .hint("send `Content-Type: application/json`, as curl --json does")
            .closing()
    }

    pub fn too_large(what: &'static str, bound: usize) -> Self {
        let message = format!("{what} is larger than {bound} bytes");
        Self::request(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message).closing()
    }

    pub(super) fn head_too_large(bound: usize) -> Self {
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        let refusal = Self::too_large("the request's head", bound);
        Self { status, ..refusal }.hint("at most 100 headers are taken")
    }

    pub fn too_slow(what: &'static str) -> Self {
        let message = format!("{what} did not come whole in time");
        Self::request(StatusCode::REQUEST_TIMEOUT, "too_slow", message).closing()
    }

    pub fn too_many_connections(bound: usize) -> Self {
        let message = format!("{bound} connections to this socket are open, which is the most");
        Self::request(StatusCode::TOO_MANY_REQUESTS, "too_many_connections", message)
            .hint("close those that are not used")
            .closing()
    }

    pub fn too_many_requests(bound: usize) -> Self {
        let message = format!("{bound} requests on this socket are being answered");
        Self::request(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", message)
            .hint("ask again when one of them is answered")
            .closing()
    }

    pub fn peer_not_permitted(uid: u32) -> Self {
        let message = format!("a process of uid {uid} may not speak on this run's socket");
        Self::request(StatusCode::FORBIDDEN, "peer_not_permitted", message)
            .hint("the run's execs, its workspace's owner and who started it may")
            .closing()
    }

    /// A fault of this program.
    pub fn internal(message: impl Into<String>) -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self::request(status, "internal", message).hint("the service's log tells more").closing()
    }

    /// What an exec's stream ended with.
    pub fn of_exec(error: ErrorObject) -> Self {
        let ErrorObject { stage, reason, message, hint } = error;
        let status = status_of(&stage, &reason);
        Self { status, stage: stage.into(), reason: reason.into(), message, hint, closes: false }
    }

    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorObject {
                stage: self.stage.clone().into_owned(),
                reason: self.reason.clone().into_owned(),
                message: self.message.clone(),
                hint: self.hint.clone(),
            },
        }
    }

    fn json(&self) -> Vec<u8> {
        // Four strings always have a JSON form.
        serde_json::to_vec(&self.body()).unwrap_or_default()
    }

    /// The whole answer, for a connection that speaks no HTTP yet or any more.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let json = self.json();
        let head = format!(
            "HTTP/1.1 {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            self.status,
            json.len()
        );
        [head.into_bytes(), json].concat()
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.json()));
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, JSON);
        if self.closes {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<BrokerError> for Refusal {
    fn from(error: BrokerError) -> Self {
        let message = match &error {
            // As the command line tells it.
            BrokerError::Run(RunError::Denied(denial)) => {
                format!("{} is denied: {}: {}", denial.asked, denial.reason, denial.message)
            }
            other => chain(other),
        };
        Self {
            status: status_of(error.stage(), error.reason()),
            stage: error.stage().into(),
            reason: error.reason().into(),
            message,
            hint: error.hint(),
            closes: false,
        }
    }
}

/// At most some 1,100 bytes; the end, where a position stands, is kept.
fn without_middle(text: String) -> String {
    const HEAD: usize = 900;
    const TAIL: usize = 200;
    if text.len() <= HEAD + TAIL {
        return text;
    }
    let head = text.floor_char_boundary(HEAD);
    let tail = text.ceil_char_boundary(text.len() - TAIL);
    format!("{} … {}", text.get(..head).unwrap_or_default(), text.get(tail..).unwrap_or_default())
}

fn status_of(stage: &str, reason: &str) -> StatusCode {
    // Denials, and leases that are not what they were.
    if stage == "decide" || DenyReason::ALL.iter().any(|r| r.as_str() == reason) {
        return StatusCode::FORBIDDEN;
    }
    match reason {
        "not_found" => StatusCode::NOT_FOUND,
        // `stopped`: revoked, or its run ended, before the command ran.
        "conflict" | "run_mismatch" | "stopped" => StatusCode::CONFLICT,
        "draining" => StatusCode::SERVICE_UNAVAILABLE,
        "too_many_execs" => StatusCode::TOO_MANY_REQUESTS,
        // What was asked for cannot be had, however often it is asked.
        "malformed"
        | "invalid_request"
        | "environment_refused"
        | "managed_value_refused"
        | "network_would_widen"
        | "profile_unusable"
        | "profile_invalid"
        | "command_not_executable"
        | "command_not_found" => StatusCode::BAD_REQUEST,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::verdict::Denial;

    #[track_caller]
    fn check(error: BrokerError, status: u16, stage: &str, reason: &str, message: &str) {
        let refusal = Refusal::from(error);
        let told = (refusal.status.as_u16(), &*refusal.stage, &*refusal.reason, &*refusal.message);
        assert_eq!(told, (status, stage, reason, message));
    }

    #[test]
    fn errors_have_their_status_and_their_words() {
        check(
            BrokerError::NotFound { what: "lease `lse_1`".into() },
            404,
            "request",
            "not_found",
            "there is no lease `lse_1`",
        );
        check(
            BrokerError::Conflict { message: "it ended".into() },
            409,
            "request",
            "conflict",
            "it ended",
        );
        let draining = "the broker is shutting down and grants nothing any more";
        check(BrokerError::Draining, 503, "request", "draining", draining);
        let many = "3 execs of this run are alive, which is the most";
        check(BrokerError::TooManyExecs { live: 3 }, 429, "request", "too_many_execs", many);
        check(
            BrokerError::Run(RunError::Denied(Denial {
                asked: "a.b@c".into(),
                reason: DenyReason::RateExceededRun,
                message: "500 were asked for".into(),
                hint: String::new(),
            })),
            403,
            "decide",
            "rate_exceeded_run",
            "a.b@c is denied: rate_exceeded_run: 500 were asked for",
        );
        check(
            BrokerError::Run(RunError::Clock(std::io::Error::other("no clock"))),
            500,
            "settle",
            "clock_unusable",
            "could not read the clocks: no clock",
        );
    }

    #[test]
    fn a_message_does_not_echo_what_was_sent_without_bound() {
        let long = format!("`{}` is no id at line 1 column 7", "ä".repeat(100_000));
        let told = Refusal::malformed(long).message;
        assert!(told.len() < 1_200, "{}", told.len());
        assert!(told.starts_with("`ä") && told.ends_with("column 7"), "{told}");
        assert_eq!(Refusal::malformed("short").message, "short");
    }

    #[test]
    fn every_denial_is_forbidden() {
        assert_eq!(status_of("decide", "lease_expired"), StatusCode::FORBIDDEN);
        for reason in DenyReason::ALL {
            assert_eq!(status_of("", reason.as_str()), StatusCode::FORBIDDEN, "{reason}");
        }
    }
}
