//! Granted or denied. A denial has a name that programs match on, a message and a hint for people.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Why a lease is not granted. The names are part of the interface (`DenyReason::as_str`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DenyReason {
    CapabilityNotDeclared,
    AudienceNotPermitted,
    ChannelMismatch,
    PermissionMissing,
    TtlExceedsPolicy,
    UsesExceedChannel,
    RateExceededMinute,
    RateExceededRun,
    CommandNotPermitted,
    RunNotActive,
    SecretNotAllowed,
    IdentityNotConfigured,
    ProtectionUnavailable,
    AuditUnavailable,
    SourceUnavailable,
    DeliveryUnavailable,
}

impl DenyReason {
    pub const ALL: [DenyReason; 16] = [
        DenyReason::CapabilityNotDeclared,
        DenyReason::AudienceNotPermitted,
        DenyReason::ChannelMismatch,
        DenyReason::PermissionMissing,
        DenyReason::TtlExceedsPolicy,
        DenyReason::UsesExceedChannel,
        DenyReason::RateExceededMinute,
        DenyReason::RateExceededRun,
        DenyReason::CommandNotPermitted,
        DenyReason::RunNotActive,
        DenyReason::SecretNotAllowed,
        DenyReason::IdentityNotConfigured,
        DenyReason::ProtectionUnavailable,
        DenyReason::AuditUnavailable,
        DenyReason::SourceUnavailable,
        DenyReason::DeliveryUnavailable,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            DenyReason::CapabilityNotDeclared => "capability_not_declared",
            DenyReason::AudienceNotPermitted => "audience_not_permitted",
            DenyReason::ChannelMismatch => "channel_mismatch",
            DenyReason::PermissionMissing => "permission_missing",
            DenyReason::TtlExceedsPolicy => "ttl_exceeds_policy",
            DenyReason::UsesExceedChannel => "uses_exceed_channel",
            DenyReason::RateExceededMinute => "rate_exceeded_minute",
            DenyReason::RateExceededRun => "rate_exceeded_run",
            DenyReason::CommandNotPermitted => "command_not_permitted",
            DenyReason::RunNotActive => "run_not_active",
            DenyReason::SecretNotAllowed => "secret_not_allowed",
            DenyReason::IdentityNotConfigured => "identity_not_configured",
            DenyReason::ProtectionUnavailable => "protection_unavailable",
            DenyReason::AuditUnavailable => "audit_unavailable",
            DenyReason::SourceUnavailable => "source_unavailable",
            DenyReason::DeliveryUnavailable => "delivery_unavailable",
        }
    }
}

impl std::fmt::Display for DenyReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One denial, whole: what was asked, the reason's name, why, what would be allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{asked}: denied, {reason}: {message}")]
pub struct Denial {
    /// `repo.push@github.com`.
    pub asked: String,
    pub reason: DenyReason,
    /// Why, in one sentence, with the subject.
    pub message: String,
    /// What would be allowed, or what to change.
    pub hint: String,
}
