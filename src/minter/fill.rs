//! Placeholders of the configuration, `{resource}`, filled in from the facts: only within the strings of a
//! JSON text, so that whatever a fact holds stays a part of that string.
#![forbid(unsafe_code)]

use serde_json::Value;

use crate::model::mint::{Facts, Failure, Fault};

/// # Errors
/// The text is no JSON, or names what there is nothing for.
pub fn json(text: &str, facts: &Facts) -> Result<String, Failure> {
    let mut value: Value = serde_json::from_str(text).map_err(|_| Failure::of(Fault::Settings))?;
    fill(&mut value, facts)?;
    Ok(value.to_string())
}

fn fill(value: &mut Value, facts: &Facts) -> Result<(), Failure> {
    match value {
        Value::String(text) => {
            *text = words(text, facts)?;
            Ok(())
        }
        Value::Array(items) => items.iter_mut().try_for_each(|item| fill(item, facts)),
        Value::Object(members) => members.values_mut().try_for_each(|member| fill(member, facts)),
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
    }
}

/// `{name}` is a placeholder where `name` is lower case, digits, `.`, `-` and `_`; any other brace is itself.
pub fn words(text: &str, facts: &Facts) -> Result<String, Failure> {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        filled.push_str(before);
        let plain =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        match after.split_once('}') {
            Some((name, behind)) if !name.is_empty() && name.bytes().all(plain) => {
                filled.push_str(facts.word(name).ok_or(Failure::of(Fault::Unnarrowed))?);
                rest = behind;
            }
            _ => {
                filled.push('{');
                rest = after;
            }
        }
    }
    filled.push_str(rest);
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fact_stays_within_its_string() {
        let hostile = r#"x","Effect":"Allow","Resource":"*"#;
        let facts = Facts {
            capability: "repo.push".into(),
            audience: "api.test".into(),
            constraints: vec![("bucket".into(), hostile.into()), ("resource".into(), "a/b".into())],
            ..Facts::default()
        };
        let filled =
            json(r#"{"Resource":"arn:{bucket}/*","a":["{action}","{resource}",7]}"#, &facts);
        let filled: Value = serde_json::from_str(&filled.unwrap()).unwrap();
        assert_eq!(filled["Resource"], format!("arn:{hostile}/*"));
        assert_eq!(filled["a"], serde_json::json!(["repo.push", "a/b", 7]));
        assert_eq!(filled.as_object().unwrap().len(), 2);

        #[track_caller]
        fn check(text: &str, facts: &Facts, expected: Option<&str>) {
            assert_eq!(words(text, facts).ok().as_deref(), expected, "{text}");
        }
        check("{audience}", &facts, Some("api.test"));
        check("a{}b{ c {audience", &facts, Some("a{}b{ c {audience"));
        check("${aws:username}{audience}", &facts, Some("${aws:username}api.test"));
        check("{nothing}", &facts, None);
    }
}
