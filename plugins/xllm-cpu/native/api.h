// What Python calls, by ctypes. Plain C: pointers, counts, strides in elements. Shapes are the caller's to check; values that select memory
// (token ids, slots, block ids) are checked here. Returns 0, or the 1-based number of the first bad value, and then nothing was written
// that the caller may use.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define XLLM_API extern "C" __attribute__((visibility("default")))
#else
#define XLLM_API extern "C"
#endif

// Raised with every change of what stands below: kernels and callers of unlike numbers do not fit each other (`ABI` of xllm_cpu/native.py).
#define XLLM_ABI 1
XLLM_API int xllm_abi();

XLLM_API const char* xllm_isa();
XLLM_API int xllm_max_rows();
XLLM_API void xllm_set_threads(int count);
XLLM_API int xllm_threads();

// Linear. n: rows of the weight (with `fuses` both halves), k: its columns. bias: float32, packed like the columns. is_wide: out is float32,
// without `fuses`.
XLLM_API int64_t xllm_packed_elements(int64_t n, int64_t k, int is_bf16, int fuses);
XLLM_API int64_t xllm_packed_columns(int64_t n, int fuses);
XLLM_API int xllm_pack(const void* weight, int64_t n, int64_t k, int is_bf16, int fuses, void* out);
XLLM_API int xllm_pack_bias(const float* bias, int64_t n, int fuses, float* out);
XLLM_API int xllm_linear(
    const void* x, const void* packed, const float* bias, void* out, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo, int is_bf16, int fuses,
    int is_wide);

// The same over 8-bit integers. weight: [n][k]; steps: [n], of its rows. room: [m][xllm_int8_room(k)] bytes, for the rows of x in 8 bits.
XLLM_API int64_t xllm_int8_bytes(int64_t n, int64_t k, int fuses);
XLLM_API int64_t xllm_int8_room(int64_t k);
XLLM_API int xllm_pack_int8(const int8_t* weight, const float* steps, int64_t n, int64_t k, int fuses, void* out);
XLLM_API int xllm_linear_int8(
    const void* x, const void* packed, const float* bias, void* out, void* room, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo, int is_bf16,
    int fuses, int is_wide);

// The same over blocks of 32 columns; k is a multiple of 32. codes: [n][k] int8, or with is_4_bit [n][k / 2] bytes, where byte j of a block's 16 holds
// column j in its low half and j + 16 in its high half; scales, minimums (or null): [n][k / 32] in half precision. room: [m][xllm_blocks_room(k)] bytes.
XLLM_API int64_t xllm_blocks_bytes(int64_t n, int64_t k, int is_4_bit, int has_minimums, int fuses);
XLLM_API int64_t xllm_blocks_room(int64_t k);
XLLM_API int xllm_pack_blocks(
    const void* codes, const uint16_t* scales, const uint16_t* minimums, int64_t n, int64_t k, int is_4_bit, int fuses, void* out);
XLLM_API int xllm_linear_blocks(
    const void* x, const void* packed, const float* bias, void* out, void* room, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo, int is_bf16,
    int is_4_bit, int has_minimums, int fuses, int is_wide);

// Gated experts. x, out: [tokens][hidden]; ids, weights: [tokens][top_k], id -1 is skipped; gate_up, down: the packed weights of one expert after
// the other, gate_up packed with `fuses`; counts: [num_experts], added to.
XLLM_API int xllm_experts(
    const void* x, const int64_t* ids, const float* weights, int64_t* counts, const void* gate_up, const void* down, void* out, int64_t tokens,
    int64_t top_k, int64_t num_experts, int64_t hidden, int64_t inner, int is_bf16);

// The router's choice. scores: [rows][num_experts] with row stride lds; correction: [num_experts]; ids, weights: [rows][top_k]. Groups are equal; where
// top_groups is less than num_groups they have two experts or more; top_k experts are in top_groups groups.
XLLM_API int xllm_moe_route(
    const float* scores, int64_t lds, const float* correction, int64_t* ids, float* weights, int64_t rows, int64_t num_experts, int64_t top_k,
    int64_t num_groups, int64_t top_groups, int is_normalised, float scaling);

// Rows. x: [rows][size] with row stride ldx; out is contiguous.
XLLM_API int xllm_rms_norm(  // rows stand `beside` each other in that stride: heads of a token
    const void* x, int64_t ldx, int64_t beside, const void* weight, float eps, void* out, int64_t rows, int64_t size, int is_bf16);
XLLM_API int xllm_add_rms_norm(
    const void* x, const void* residual, const void* weight, float eps, void* total, void* out, int64_t rows, int64_t size, int is_bf16);
XLLM_API int xllm_silu_mul(const void* x, int64_t ldx, void* out, int64_t rows, int64_t inner, int is_bf16);
XLLM_API int xllm_embedding(const int64_t* ids, const void* table, void* out, int64_t count, int64_t vocab, int64_t size, int is_bf16);
// The same out of a table [vocab][size] as `xllm_pack` has packed it, without `fuses`.
XLLM_API int xllm_packed_rows(const int64_t* ids, const void* packed, void* out, int64_t count, int64_t vocab, int64_t size, int is_bf16);

// x: [tokens][heads][size], head stride `size`, token stride ldx; cos, sin: [tokens][rotated]. out is contiguous.
XLLM_API int xllm_rope(
    const void* x, int64_t ldx, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads, int64_t size, int64_t rotated, int is_bf16);

// cache: [slots][size] contiguous; x: [tokens][size], token stride ldx. Slot -1 is skipped.
XLLM_API int xllm_kv_write(const void* x, int64_t ldx, void* cache, const int64_t* slots, int64_t tokens, int64_t num_slots, int64_t size, int64_t bytes);
// Queries rotated into `out`, keys rotated into their cache, values into theirs. Heads of a token lie side by side; ldq, ldk, ldv: token strides.
XLLM_API int xllm_rope_kv_write(
    const void* q, const void* k, const void* v, int64_t ldq, int64_t ldk, int64_t ldv, const void* cos, const void* sin, void* out, void* keys,
    void* values, const int64_t* slots, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, int64_t value_size, int64_t rotated,
    int64_t num_slots, int is_bf16);
// The same into codes [slots][heads][size] and steps [slots][heads]: 8 bits, as contracts/ops.py of the core defines them.
XLLM_API int xllm_kv_write_int8(
    const void* x, int64_t ldx, int8_t* codes, float* steps, const int64_t* slots, int64_t tokens, int64_t num_slots, int64_t heads, int64_t size, int is_bf16);
XLLM_API int xllm_rope_kv_write_int8(
    const void* q, const void* k, const void* v, int64_t ldq, int64_t ldk, int64_t ldv, const void* cos, const void* sin, void* out, int8_t* keys,
    int8_t* values, float* key_steps, float* value_steps, const int64_t* slots, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size,
    int64_t rotated, int64_t num_slots, int is_bf16);
XLLM_API int xllm_block_copy(void* cache, const int64_t* from, const int64_t* to, int64_t count, int64_t num_blocks, int64_t block_bytes, void* buffer);

// Have the system give the pages of some memory, which keeps what it holds.
XLLM_API void xllm_populate(void* memory, int64_t num_bytes);

// Rows of bfloat16 as float32, contiguous.
XLLM_API int xllm_widen(const void* x, int64_t ldx, float* out, int64_t rows, int64_t size);

// out = a + b, all contiguous: [rows][size].
XLLM_API int xllm_add(const void* a, const void* b, void* out, int64_t rows, int64_t size, int is_bf16);

// Attention over paged KV in layout BSGD. tasks: [num_tasks][3] (row, KV head or -1 for all, first query token).
struct XllmAttention {
  int32_t* query_starts;  // [R + 1]
  int32_t* kv_lens;       // [R]
  int32_t* tables;        // [R][table_width]
  int32_t* tasks;
  int64_t num_tasks, table_width, highest_block;  // highest_block: in any table, -1 for none
  int32_t num_rows, num_heads, num_kv_heads, head_size, block_size, window;  // window: 0 for none
  float scale, soft_cap;                                                     // soft_cap: 0 for none
  int32_t is_bf16, is_int8, max_kv_len;                                      // is_int8: the cache; is_bf16: q and out, and the cache otherwise
};
// A batch into the arrays of `step`, which have room for max_rows rows, max_tokens new tokens, table_width columns, and max_tokens * num_kv_heads tasks.
// tables: [num_rows][width]. is_decode: every row has one new token. Returns the highest block that is named, -1 for none; -2 for lengths that fit
// neither each other nor the room, and then `step` is as it was.
XLLM_API int64_t xllm_attention_lay_out(
    XllmAttention* step, const int32_t* query_starts, const int32_t* kv_lens, const int32_t* tables, int64_t num_rows, int64_t width, int64_t max_rows,
    int64_t max_tokens, int is_decode);
// q, out: [T][H][D], k, v: [B][S][G][D]; of codes also their steps, [B][S][G], with D up to 512. num_blocks: B; 1 is returned where a table names more.
XLLM_API int xllm_attention(
    const XllmAttention* step, const void* q, const void* k, const void* v, const float* k_steps, const float* v_steps, void* out, int64_t num_blocks);

// Token choice for rows of logits [rows][vocab], which are overwritten. Columns of [rows], null where no row uses the feature: temperature (0 greedy;
// null: all are; refused below 0), top_k (0 off), top_p (1 off), min_p (0 off). seeds, indices, positions: arguments of the noise; unread for greedy rows.
struct XllmSampling {
  const float* temperature;
  const int64_t* top_k;
  const float *top_p, *min_p;
  const int64_t *seeds, *indices, *positions;
};
XLLM_API int xllm_sample(float* logits, int64_t rows, int64_t vocab, const XllmSampling* sampling, int64_t* out);

// Recorded calls. arguments: in the order of the function's, integers and pointers as they are, floats in the low half. rows_at: which argument
// is the number of rows, -1 for none; it becomes rows * rows_factor.
#define XLLM_MAX_ARGUMENTS 22
struct XllmCall {
  int32_t op, rows_at;
  int64_t rows_factor;
  uint64_t arguments[XLLM_MAX_ARGUMENTS];
};
// The number of a function by its name without prefix, -1 for one that cannot be recorded.
XLLM_API int xllm_replay_op(const char* name);
// Runs them in order. Returns 0, or the 1-based number of the call that refused; those after it were not made.
XLLM_API int64_t xllm_replay(const XllmCall* calls, int64_t count, int64_t rows);
