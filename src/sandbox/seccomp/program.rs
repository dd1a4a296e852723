//! Classic BPF as seccomp(2) takes it: the few instructions that occur here, made and followed.
//!
//! Receives instructions and a call, returns where the call ends. Touches nothing; must never guess:
//! an instruction that it does not know is an error, not a fall-through.

/// One instruction, `struct sock_filter` of linux/filter.h.
pub type Insn = seccompiler::sock_filter;

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Offsets in `struct seccomp_data`, linux/seccomp.h.
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const ARGS_OFFSET: u32 = 16;

pub fn load_number() -> Insn {
    Insn { code: LOAD, jt: 0, jf: 0, k: NUMBER_OFFSET }
}

pub fn load_arch() -> Insn {
    Insn { code: LOAD, jt: 0, jf: 0, k: ARCH_OFFSET }
}

pub fn ret(action: u32) -> Insn {
    Insn { code: RETURN, jt: 0, jf: 0, k: action }
}

pub fn jump(over: u32) -> Insn {
    Insn { code: JUMP, jt: 0, jf: 0, k: over }
}

pub fn jump_if_equal(value: u32, then: u8, otherwise: u8) -> Insn {
    Insn { code: EQUAL, jt: then, jf: otherwise, k: value }
}

pub fn jump_if_at_least(value: u32, then: u8, otherwise: u8) -> Insn {
    Insn { code: AT_LEAST, jt: then, jf: otherwise, k: value }
}

/// Where execution can go from `insn` at `pc`; `None` for an instruction that is not known.
pub fn successors(insn: &Insn, pc: usize) -> Option<Vec<usize>> {
    let next = pc + 1;
    match insn.code {
        LOAD | AND => Some(vec![next]),
        JUMP => Some(vec![next + insn.k as usize]),
        EQUAL | GREATER | AT_LEAST => {
            Some(vec![next + usize::from(insn.jt), next + usize::from(insn.jf)])
        }
        RETURN => Some(Vec::new()),
        _ => None,
    }
}

/// The same program without unconditional jumps that can be jumped over and without dead instructions:
/// seccompiler begins each rule with two jumps, and the kernel's compiler takes its time for each.
pub fn tighten(program: &[Insn]) -> Vec<Insn> {
    // Backwards, so that an instruction's targets are final before it is looked at. `end[pc]` is where a
    // jump to `pc` arrives after following the unconditional ones.
    let mut end: Vec<usize> = (0..program.len()).collect();
    for (pc, insn) in program.iter().enumerate().rev() {
        if insn.code == JUMP
            && let Some(&target) = end.get(pc + 1 + insn.k as usize)
        {
            end[pc] = target;
        }
    }
    let aims = |pc: usize, by: usize| {
        let direct = pc + 1 + by;
        // Where a conditional jump can reach no further it keeps its stepping stone.
        match end.get(direct) {
            Some(&far) if far - pc - 1 <= usize::from(u8::MAX) => far,
            _ => direct,
        }
    };
    let mut alive = vec![false; program.len()];
    let mut moved: Vec<(usize, usize)> = vec![(0, 0); program.len()];
    if let Some(first) = alive.first_mut() {
        *first = true;
    }
    for (pc, insn) in program.iter().enumerate() {
        if !alive[pc] {
            continue;
        }
        moved[pc] = match insn.code {
            RETURN => continue,
            JUMP => {
                let target = pc + 1 + insn.k as usize;
                let far = end.get(target).copied().unwrap_or(target);
                (far, far)
            }
            EQUAL | GREATER | AT_LEAST => {
                (aims(pc, usize::from(insn.jt)), aims(pc, usize::from(insn.jf)))
            }
            _ => (pc + 1, pc + 1),
        };
        for target in [moved[pc].0, moved[pc].1] {
            if let Some(mark) = alive.get_mut(target) {
                *mark = true;
            }
        }
    }
    // A jump to the next living instruction is none.
    let next_alive = |pc: usize| (pc + 1..program.len()).find(|&next| alive[next]);
    let kept: Vec<bool> = (0..program.len())
        .map(|pc| alive[pc] && !(program[pc].code == JUMP && next_alive(pc) == Some(moved[pc].0)))
        .collect();
    let mut place = Vec::with_capacity(program.len());
    let mut count = 0;
    for keep in &kept {
        place.push(count);
        count += usize::from(*keep);
    }
    let distance = |pc: usize, target: usize| place.get(target).map_or(0, |to| to - place[pc] - 1);
    (0..program.len())
        .filter(|&pc| kept[pc])
        .map(|pc| {
            let (then, otherwise) = moved[pc];
            match (program[pc].code, &program[pc]) {
                (JUMP, _) => jump(distance(pc, then) as u32),
                (EQUAL | GREATER | AT_LEAST, insn) => Insn {
                    code: insn.code,
                    // Distances only shrink, and fitted before.
                    jt: distance(pc, then) as u8,
                    jf: distance(pc, otherwise) as u8,
                    k: insn.k,
                },
                (_, insn) => insn.clone(),
            }
        })
        .collect()
}

/// How a program ends for a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With this `SECCOMP_RET_*` value.
    Return(u32),
    /// It looks at an argument, at this instruction, and no arguments were given.
    NeedsArgument(usize),
}

/// The instruction at which a program could not be followed.
#[derive(Debug)]
pub struct Lost(pub usize);

/// Follows `program` for one call, as the kernel would.
///
/// # Errors
/// [`Lost`] at an instruction that is not known or lies outside the program.
pub fn walk(
    program: &[Insn],
    nr: u32,
    arch: u32,
    args: Option<&[u64; 6]>,
) -> Result<Outcome, Lost> {
    let mut a = 0u32;
    let mut pc = 0usize;
    loop {
        let insn = program.get(pc).ok_or(Lost(pc))?;
        let taken = match insn.code {
            LOAD => {
                a = match (insn.k, args) {
                    (NUMBER_OFFSET, _) => nr,
                    (ARCH_OFFSET, _) => arch,
                    (ARGS_OFFSET.., None) => return Ok(Outcome::NeedsArgument(pc)),
                    (offset @ ARGS_OFFSET.., Some(args)) => {
                        half(args, offset - ARGS_OFFSET).ok_or(Lost(pc))?
                    }
                    _ => return Err(Lost(pc)),
                };
                0
            }
            AND => {
                a &= insn.k;
                0
            }
            JUMP => insn.k as usize,
            EQUAL => usize::from(if a == insn.k { insn.jt } else { insn.jf }),
            GREATER => usize::from(if a > insn.k { insn.jt } else { insn.jf }),
            AT_LEAST => usize::from(if a >= insn.k { insn.jt } else { insn.jf }),
            RETURN => return Ok(Outcome::Return(insn.k)),
            _ => return Err(Lost(pc)),
        };
        pc += 1 + taken;
    }
}

/// The 32-bit half of the arguments at this byte offset; little-endian, so the low half comes first.
fn half(args: &[u64; 6], offset: u32) -> Option<u32> {
    let argument = args.get((offset / 8) as usize)?;
    match offset % 8 {
        0 => Some(*argument as u32),
        4 => Some((*argument >> 32) as u32),
        _ => None,
    }
}
