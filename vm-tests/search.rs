//! Looks for a value in all of a machine's memory, as it is and in every form that it takes on its way.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use memchr::memmem::Finder;

use super::Result;

/// A piece is this long: a value that lies there in part shows by its pieces.
const PIECE: usize = 16;
const CHUNK: usize = 16 << 20;

/// Where, and in which form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    pub offset: u64,
    pub form: &'static str,
    /// The bytes around it.
    pub around: Vec<u8>,
}

#[derive(Debug, Default)]
pub struct Found {
    pub hits: Vec<Hit>,
}

impl Found {
    pub fn count(&self) -> usize {
        self.hits.iter().filter(|h| h.form != "piece").count()
    }

    /// Pieces that are part of no whole copy.
    pub fn pieces(&self) -> usize {
        self.hits.len() - self.count()
    }

    /// `plain=2 base64=1`.
    pub fn words(&self) -> String {
        let mut by_form: BTreeMap<&str, usize> = BTreeMap::new();
        for hit in &self.hits {
            *by_form.entry(hit.form).or_default() += 1;
        }
        let words: Vec<String> = by_form.iter().map(|(form, n)| format!("{form}={n}")).collect();
        if words.is_empty() { "none".to_owned() } else { words.join(" ") }
    }
}

/// All of `memory` that was ever touched.
pub fn search(memory: &Path, value: &[u8]) -> Result<Found> {
    let failed = |e: std::io::Error| format!("{}: {e}", memory.display());
    let file = File::open(memory).map_err(failed)?;
    let needles = forms(value);
    let overlap = needles.iter().map(|(_, n)| n.len()).max().unwrap_or(1);
    let size = file.metadata().map_err(failed)?.len();
    let mut found = Found::default();
    let mut buffer = vec![0; CHUNK + overlap];
    let mut at = 0;
    while at < size {
        // Holes were never written.
        let data = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(failed(e.into())),
        };
        let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data))
            .map_err(|e| failed(e.into()))?;
        let mut start = data;
        while start < hole {
            let len = ((hole - start) as usize).min(CHUNK + overlap);
            file.read_exact_at(&mut buffer[..len], start).map_err(failed)?;
            look(&buffer[..len], start, &needles, &mut found);
            start += CHUNK as u64;
        }
        at = hole;
    }
    found.hits.sort_by_key(|h| (h.offset, h.form));
    // What two chunks share is seen twice.
    found.hits.dedup_by_key(|h| (h.offset, h.form));
    drop_pieces_of_wholes(&mut found.hits, value.len());
    Ok(found)
}

fn look(bytes: &[u8], start: u64, needles: &[(&'static str, Vec<u8>)], found: &mut Found) {
    for (form, needle) in needles {
        for at in Finder::new(needle).find_iter(bytes) {
            let around = at.saturating_sub(48)..(at + needle.len() + 48).min(bytes.len());
            let hit = Hit { offset: start + at as u64, form, around: bytes[around].to_owned() };
            found.hits.push(hit);
        }
    }
}

fn drop_pieces_of_wholes(hits: &mut Vec<Hit>, len: usize) {
    let wholes: Vec<u64> = hits.iter().filter(|h| h.form == "plain").map(|h| h.offset).collect();
    hits.retain(|hit| {
        let within = |whole: &u64| (*whole..*whole + len as u64).contains(&hit.offset);
        hit.form != "piece" || !wholes.iter().any(within)
    });
}

/// The forms, each once.
pub fn forms(value: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let hex = |upper: bool| -> Vec<u8> {
        let digits = |b: &u8| if upper { format!("{b:02X}") } else { format!("{b:02x}") };
        value.iter().map(digits).collect::<String>().into_bytes()
    };
    let percent: String = value
        .iter()
        .map(|b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                (*b as char).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect();
    let mut forms = vec![
        ("plain", value.to_vec()),
        ("hex", hex(false)),
        ("hex", hex(true)),
        ("percent", percent.into_bytes()),
        ("utf-16", value.iter().flat_map(|b| [*b, 0]).collect()),
    ];
    // Whatever stands before it and after it: only the letters that are the value's alone.
    for before in 0..3_usize {
        let mut text = vec![0; before];
        text.extend_from_slice(value);
        let first = (before * 4).div_ceil(3);
        let last = text.len() * 8 / 6;
        for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
            forms.push(("base64", engine.encode(&text).as_bytes()[first..last].to_vec()));
        }
    }
    for piece in value.chunks_exact(PIECE / 2).collect::<Vec<_>>().windows(2) {
        forms.push(("piece", piece.concat()));
    }
    let mut seen = std::collections::BTreeSet::new();
    forms.retain(|(_, needle)| seen.insert(needle.clone()));
    forms
}

/// The forms are found, and nothing else is: before any machine is believed.
pub fn check_itself(dir: &Path) -> Result<()> {
    let value = b"r9/Kq+Zt7w=LmX4.search-must-find_this~02";
    let place = dir.join("search");
    let mut text = vec![7; 3 * CHUNK];
    std::fs::write(&place, &text).map_err(|e| format!("{}: {e}", place.display()))?;
    if !search(&place, value)?.hits.is_empty() {
        return Err("the search finds a value where there is none".to_owned());
    }
    // Across the boundary of two chunks, too.
    let around = format!("x{}", String::from_utf8_lossy(value));
    let encoded = STANDARD_NO_PAD.encode(around);
    for (at, what) in
        [(5, &value[..]), (CHUNK - 9, &value[..]), (2 * CHUNK - 3, encoded.as_bytes())]
    {
        text[at..at + what.len()].copy_from_slice(what);
    }
    text[100..120].copy_from_slice(&value[8..28]);
    std::fs::write(&place, &text).map_err(|e| format!("{}: {e}", place.display()))?;
    let words = search(&place, value)?.words();
    std::fs::remove_file(&place).map_err(|e| format!("{}: {e}", place.display()))?;
    if words == "base64=1 piece=1 plain=2" {
        Ok(())
    } else {
        Err(format!("the search found {words}"))
    }
}
