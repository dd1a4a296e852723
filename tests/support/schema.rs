//! JSON against a schema of the OpenAPI description: the part of JSON Schema 2020-12 that it uses, and a
//! panic at any keyword beyond, so that nothing passes unjudged.

use serde_json::{Map, Value};

/// Whether members that no schema names are faults.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Judge {
    /// As a client reads: unknown members are skipped, unless the schema is closed.
    AsWritten,
    /// Every member of an answer must be described.
    Whole,
}

pub struct Description(Value);

impl Description {
    pub fn new() -> Self {
        let text = sublet::api::server::routes::description();
        Self(serde_json::from_str(text).expect("the description is JSON"))
    }

    pub fn root(&self) -> &Value {
        &self.0
    }

    pub fn schema(&self, name: &str) -> &Value {
        let found = self.0.pointer(&format!("/components/schemas/{name}"));
        found.unwrap_or_else(|| panic!("there is no schema {name}"))
    }

    /// What an operation answers with at this status, or at any other.
    pub fn answer(&self, method: &str, path: &str, status: u16) -> &Value {
        let responses = &self.0["paths"][path][method.to_lowercase()]["responses"];
        let response = responses.get(status.to_string()).unwrap_or(&responses["default"]);
        assert!(response.is_object(), "{method} {path} does not describe {status}");
        let content = self.followed(response)["content"].as_object().expect("content");
        &content.values().next().expect("one type")["schema"]
    }

    pub fn followed<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value.get("$ref").and_then(Value::as_str) {
            Some(place) => {
                let pointer = place.strip_prefix('#').expect("references stay in the document");
                let target = self.0.pointer(pointer);
                self.followed(target.unwrap_or_else(|| panic!("{place} leads nowhere")))
            }
            None => value,
        }
    }

    /// Every fault of `value`, with its place.
    pub fn faults(&self, schema: &Value, value: &Value, judge: Judge) -> Vec<String> {
        let mut faults = Vec::new();
        self.judge(schema, value, judge, "", &mut faults);
        faults
    }

    fn judge(&self, schema: &Value, value: &Value, judge: Judge, at: &str, out: &mut Vec<String>) {
        let schema = self.followed(schema);
        let keywords = schema.as_object().expect("a schema is an object");
        for (keyword, rule) in keywords {
            let fault = match keyword.as_str() {
                "description" | "format" | "pattern" | "default" | "contentEncoding" => None,
                "type" => (!has_type(rule, value)).then(|| format!("is not {rule}")),
                "enum" => {
                    let listed = rule.as_array().is_some_and(|all| all.contains(value));
                    (!listed).then(|| format!("{value} is not in {rule}"))
                }
                "minimum" => below(value.as_i64(), rule).then(|| format!("is less than {rule}")),
                "maximum" => above(value.as_i64(), rule).then(|| format!("is more than {rule}")),
                "minLength" => below(length(value), rule).then(|| "is too short".to_owned()),
                "maxLength" => above(length(value), rule).then(|| "is too long".to_owned()),
                "minItems" => below(items(value), rule).then(|| "has too few items".to_owned()),
                "required" => missing(rule, value),
                "oneOf" => {
                    let all = rule.as_array().expect("oneOf lists schemas");
                    let fit = |s: &&Value| self.faults(s, value, judge).is_empty();
                    let count = all.iter().filter(fit).count();
                    (count != 1).then(|| format!("fits {count} of {}", all.len()))
                }
                "items" => {
                    for (i, item) in value.as_array().into_iter().flatten().enumerate() {
                        self.judge(rule, item, judge, &format!("{at}/{i}"), out);
                    }
                    None
                }
                "properties" => {
                    for (name, of_it) in rule.as_object().expect("properties") {
                        if let Some(member) = value.get(name) {
                            self.judge(of_it, member, judge, &format!("{at}/{name}"), out);
                        }
                    }
                    None
                }
                "additionalProperties" => {
                    for (name, member) in others(keywords, value) {
                        match rule {
                            Value::Bool(true) => {}
                            Value::Bool(false) => out.push(format!("{at}/{name} is not known")),
                            of_it => self.judge(of_it, member, judge, &format!("{at}/{name}"), out),
                        }
                    }
                    None
                }
                other => panic!("the validator does not know `{other}`"),
            };
            out.extend(fault.map(|fault| format!("{at} {fault}")));
        }
        if judge == Judge::Whole && !keywords.contains_key("additionalProperties") {
            out.extend(
                others(keywords, value).map(|(name, _)| format!("{at}/{name}: undescribed")),
            );
        }
    }
}

/// The members that `properties` does not name.
fn others<'a>(
    schema: &'a Map<String, Value>,
    value: &'a Value,
) -> impl Iterator<Item = (&'a String, &'a Value)> {
    let named = schema.get("properties");
    let members = value.as_object().into_iter().flatten();
    members.filter(move |(name, _)| named.is_none_or(|n| n.get(name.as_str()).is_none()))
}

fn has_type(rule: &Value, value: &Value) -> bool {
    match rule {
        Value::Array(any) => any.iter().any(|rule| has_type(rule, value)),
        rule => match rule.as_str().expect("a type is a word") {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "integer" => value.is_i64() || value.is_u64(),
            "boolean" => value.is_boolean(),
            "null" => value.is_null(),
            other => panic!("the validator does not know the type `{other}`"),
        },
    }
}

fn missing(rule: &Value, value: &Value) -> Option<String> {
    let members = value.as_object()?;
    let names = rule.as_array().expect("required lists names").iter();
    let mut absent = names.filter(|name| !members.contains_key(name.as_str().expect("a name")));
    absent.next().map(|name| format!("has no {name}"))
}

fn length(value: &Value) -> Option<i64> {
    value.as_str().map(|text| text.chars().count() as i64)
}

fn items(value: &Value) -> Option<i64> {
    value.as_array().map(|all| all.len() as i64)
}

fn below(number: Option<i64>, bound: &Value) -> bool {
    number.is_some_and(|n| n < bound.as_i64().expect("a number"))
}

fn above(number: Option<i64>, bound: &Value) -> bool {
    number.is_some_and(|n| n > bound.as_i64().expect("a number"))
}
