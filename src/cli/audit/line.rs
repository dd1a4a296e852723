//! An event as one line for people, or as it is hashed.
#![forbid(unsafe_code)]

use serde_json::Value;

use crate::cli::fail::Failure;
use crate::cli::output::Output;
use crate::model::event::Event;
use crate::model::moment::timestamp_text;

/// With `--json` the line as it is hashed; else when, what, whose, and the rest as `key=value`.
pub(super) fn tell(output: &mut Output, event: &Event) -> Result<(), Failure> {
    if output.json {
        return output.bytes(format!("{}\n", event.line()).as_bytes());
    }
    let mut words = vec![
        format!("{:>5}", event.seq),
        timestamp_text(event.time),
        format!("{:<17}", event.kind.as_str()),
    ];
    let mut say = |key: &str, value: Option<String>| {
        words.extend(value.map(|value| format!("{key}={}", quoted(&value))));
    };
    let asked = match (&event.capability, &event.audience) {
        (Some(capability), Some(audience)) => Some(format!("{capability}@{audience}")),
        (capability, _) => capability.as_ref().map(ToString::to_string),
    };
    say("asked", asked);
    say("outcome", event.outcome.clone());
    say("reason", event.reason.clone());
    say("channel", event.channel.map(|channel| channel.to_string()));
    say("ttl", event.ttl_seconds.map(|ttl| format!("{ttl}s")));
    say("uses", event.uses.map(|uses| uses.to_string()));
    say("lease", event.lease_id.as_ref().map(ToString::to_string));
    say("exec", event.exec_id.as_ref().map(ToString::to_string));
    say("run", event.run_id.as_ref().map(ToString::to_string));
    say("agent", event.agent.as_ref().map(ToString::to_string));
    say("principal", event.principal.as_ref().map(ToString::to_string));
    for (key, value) in &event.detail {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        say(key, Some(value));
    }
    output.line(words.join(" ").replace('\n', "\\n"))
}

/// Words with spaces are told apart from the next key.
fn quoted(text: &str) -> String {
    let is_plain = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c == '"');
    if is_plain { text.to_owned() } else { format!("{text:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_with_spaces_are_quoted() {
        assert_eq!(quoted("plain"), "plain");
        assert_eq!(quoted("two words"), "\"two words\"");
        assert_eq!(quoted(""), "\"\"");
    }
}
